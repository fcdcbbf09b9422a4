"""What the picture of an attribution shows, read back from the figure before it is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matplotlib.colors import to_hex
from torch import Tensor

from uoe_peft.attribution import ExpertAttribution
from uoe_peft.attribution.expert_use import ExpertUse
from uoe_peft.attribution.plots import figure_of
from uoe_peft.palette import FORGET, RETAIN

NUM_EXPERTS = 40  # more than the picture has room for


def use(ratio: Tensor) -> ExpertUse:
    return ExpertUse(ratio, ratio, ratio, num_sequences=3, num_tokens=50, top_k=2, fingerprint="0" * 16)


@pytest.fixture
def attribution() -> ExpertAttribution:
    """In layer 7 expert 5 is the busiest on the forget set, expert 4 the next, and so on round to expert 6."""
    order = torch.arange(NUM_EXPERTS)
    ratio = ((order - 6) % NUM_EXPERTS + 1) / 1000
    forget, retain = torch.stack([ratio.flip(0), ratio]), torch.stack([ratio, ratio.flip(0)])
    return ExpertAttribution(forget, (2, 7), score="gate", gate="softmax", forget=use(forget), retain=use(retain))


def test_each_bar_stands_over_the_number_of_its_expert(attribution: ExpertAttribution) -> None:
    _, bars, *_ = figure_of(attribution, [(7, 5)]).axes
    named = [int(label.get_text()) for label in bars.get_xticklabels()]
    assert named == [5, 4, 3, 2, 1, 0, *range(39, 21, -1)]
    forget, retain = bars.containers
    assert attribution.forget is not None and attribution.retain is not None
    for container, ratio, colour in (
        (forget, attribution.forget.token_ratio, FORGET),
        (retain, attribution.retain.token_ratio, RETAIN),
    ):
        heights = torch.tensor([bar.get_height() for bar in container], dtype=torch.float32)
        assert torch.allclose(heights, 2 * ratio[1, named])
        assert {to_hex(bar.get_facecolor()) for bar in container} == {colour}
    places = [(one.get_x() + other.get_x() + other.get_width()) / 2 for one, other in zip(forget, retain, strict=True)]
    assert places == pytest.approx(list(bars.get_xticks()), abs=1e-6)
    assert len(bars.lines) == 0  # experts are categories: nothing lies between them
    assert "24 of 40" in bars.get_title(loc="left")


@pytest.mark.parametrize("chosen", [5, 39, 10])  # first, in the middle, none of the busiest
def test_the_frame_is_around_the_chosen_experts_number(attribution: ExpertAttribution, chosen: int) -> None:
    _, bars, *_ = figure_of(attribution, [(7, chosen), (2, 0)]).axes
    framed = [label.get_text() for label in bars.get_xticklabels() if label.get_bbox_patch() is not None]
    assert framed == [str(chosen)]


def test_the_heat_map_frames_the_targets(attribution: ExpertAttribution) -> None:
    heat_map = figure_of(attribution, [(7, 5), (2, 30)]).axes[0]
    assert [frame.get_xy() for frame in heat_map.patches] == [(4.5, 0.5), (29.5, -0.5)]


def test_few_experts_are_all_shown(attribution: ExpertAttribution) -> None:
    assert attribution.forget is not None
    few = use(attribution.forget.token_ratio[:, :6])
    small = replace(attribution, affinity=attribution.affinity[:, :6], forget=few, retain=None)
    _, bars, *_ = figure_of(small, [(7, 0)]).axes
    assert [label.get_text() for label in bars.get_xticklabels()] == ["5", "4", "3", "2", "1", "0"]
    assert bars.get_title(loc="left") == "Use of the experts of layer 7"
