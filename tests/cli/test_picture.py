"""The picture shows the target where it is, and every score."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from uoe_peft.attribution import ExpertAttribution
from uoe_peft.cli.picture import curves_on, draw, draw_training, figure_of
from uoe_peft.evaluation import AnswerScores, UnlearningReport
from uoe_peft.palette import FORGET, RETAIN

ATTRIBUTION = ExpertAttribution(
    affinity=torch.tensor([[0.1, 0.2, 0.0, 0.0, 0.1], [0.0, 0.3, 0.1, 0.0, 0.5], [0.0, 0.0, 0.1, 0.1, 0.2]]),
    layer_indices=(2, 5, 6),
    score="gate",
    gate="softmax",
)
REPORT = UnlearningReport(
    scores={
        "base": {"forget": AnswerScores(0.91, 0.82, 7), "retain": AnswerScores(None, 0.73, 5)},
        "unlearned": {"forget": AnswerScores(0.24, 0.15, 7), "retain": AnswerScores(None, 0.56, 5)},
    }
)


def picture() -> Figure:
    return figure_of(ATTRIBUTION, [(5, 4)], report=REPORT, topic="potions")


def test_the_frame_is_around_the_target() -> None:
    heat_map = picture().axes[0]
    (frame,) = heat_map.patches
    assert frame.get_xy() == (3.5, 0.5)  # column of expert 4, row of layer 5
    assert [label.get_text() for label in heat_map.get_yticklabels()] == ["2", "5", "6"]
    assert "potions" in heat_map.get_title(loc="left")


def test_every_score_is_written_on_its_bar() -> None:
    written = {text.get_text() for axes in picture().axes for text in axes.texts}
    assert written == {"0.91", "0.24", "no prompts", "0.82", "0.73", "0.15", "0.56"}


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", attribution=ATTRIBUTION, targets=[(5, 4)], report=REPORT, topic="potions")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"uoe-peft\[plots\]"):
        picture()


LOG = [
    {"loss": 1.0, "step": 1},
    {"step": 5, "forget_accuracy": 0.9, "retain_accuracy": 0.8},
    {"step": 10, "forget_accuracy": 0.0},
    {"step": 15, "forget_accuracy": 0.1, "retain_accuracy": 1.0},
]


def test_the_training_curve_shows_what_the_log_holds() -> None:
    axes = Figure().subplots()
    curves_on(axes, LOG)
    forget, retain = axes.lines
    assert forget.get_xydata().tolist() == [[5, 0.9], [10, 0.0], [15, 0.1]]
    assert retain.get_xydata().tolist() == [[5, 0.8], [15, 1.0]]
    assert (forget.get_color(), retain.get_color()) == (FORGET, RETAIN)
    assert {text.get_text(): text.xy for text in axes.texts} == {"forget": (15, 0.1), "retain": (15, 1.0)}


@pytest.mark.parametrize("ends", [(0.50, 0.52), (0.52, 0.50), (0.5, 0.5)])
def test_names_of_curves_that_meet_do_not_lie_on_each_other(ends: tuple[float, float]) -> None:
    axes = Figure().subplots()
    curves_on(axes, [{"step": 3, "forget_accuracy": ends[0], "retain_accuracy": ends[1]}])
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert abs(heights["forget"] - heights["retain"]) >= 12  # points
    assert (heights["forget"] >= heights["retain"]) == (ends[0] >= ends[1])


def test_a_log_without_accuracies_draws_nothing(tmp_path: Path) -> None:
    assert draw_training(tmp_path / "a.png", [{"loss": 1.0, "step": 1}]) is False
    assert not (tmp_path / "a.png").exists()
    assert draw_training(tmp_path / "a.png", LOG) is True
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
