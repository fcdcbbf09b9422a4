"""The result ranks and selects without ambiguity, survives a file bit for bit, and can be looked at."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from uoe_peft.attribution import ExpertAttribution, attribute_experts

pytestmark = pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")

# Layers 3, 5 and 9; the best two lie in different layers, the best pair of one layer in layer 5.
AFFINITY = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.6, 0.7, 0.0, 0.0], [0.0, 0.0, 0.1, 0.1]])


@pytest.fixture
def small() -> ExpertAttribution:
    return ExpertAttribution(AFFINITY, (3, 5, 9), score="gate", gate="softmax")


@pytest.fixture
def measured(
    model: PreTrainedModel, forget_set: Dataset, retain_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> ExpertAttribution:
    return attribute_experts(
        model, forget_set, processing_class=tokenizer, retain_dataset=retain_set, seed=5, show_progress=False
    )


def test_ranking_is_by_affinity_then_layer_then_expert(small: ExpertAttribution) -> None:
    ranking = small.ranking()
    assert len(ranking) == 12
    assert [entry[:2] for entry in ranking[:6]] == [(3, 0), (5, 1), (5, 0), (3, 1), (9, 2), (9, 3)]
    assert [entry[:2] for entry in ranking[6:]] == [(3, 2), (3, 3), (5, 2), (5, 3), (9, 0), (9, 1)]
    assert ranking[0][2] == pytest.approx(0.9)


def test_experts_that_were_not_measured_are_not_ranked(small: ExpertAttribution) -> None:
    affinity = AFFINITY.clone()
    affinity[0, 0] = torch.nan
    assert replace(small, affinity=affinity).top(1) == [(5, 1)]
    assert len(replace(small, affinity=affinity).ranking()) == 11


def test_top_takes_the_best_anywhere_or_of_the_best_layer(small: ExpertAttribution) -> None:
    assert small.top() == [(3, 0)]
    assert small.top(3) == [(3, 0), (5, 1), (5, 0)]
    assert small.top(1, strategy="same_layer") == [(3, 0)]
    assert small.top(2, strategy="same_layer") == [(5, 1), (5, 0)]  # 1.3 against 1.0
    assert small.top(2, exclude_layers=[3]) == [(5, 1), (5, 0)]
    assert small.top(2, strategy="same_layer", exclude_layers=[5]) == [(3, 0), (3, 1)]


def test_top_of_each_layer_is_what_each_layer_alone_would_give(small: ExpertAttribution) -> None:
    for m in (1, 2, 4):
        alone = [small.top(m, strategy="same_layer", exclude_layers={3, 5, 9} - {layer}) for layer in (3, 5)]
        assert small.top(m, strategy="each_layer", exclude_layers=[9]) == [*alone[0], *alone[1]]


def test_layers_with_equal_sums_are_taken_in_the_models_order(small: ExpertAttribution) -> None:
    tied = replace(small, affinity=torch.full((3, 4), 0.25))
    assert tied.top(2, strategy="same_layer") == [(3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "cannot choose 0 experts"),
        ({"m": 13}, "use 1 to 12"),
        ({"m": 5, "strategy": "same_layer"}, "use 1 to 4"),
        ({"m": 5, "strategy": "each_layer"}, "use 1 to 4"),
        ({"strategy": "any"}, "strategy must be"),
        ({"exclude_layers": [4]}, r"attributed are \[3, 5, 9\]"),
    ],
)
def test_impossible_selections_are_named(small: ExpertAttribution, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.top(**options)


def test_wrong_shapes_and_pairs_are_named(small: ExpertAttribution) -> None:
    with pytest.raises(ValueError, match="one row for each of the 2 layers"):
        ExpertAttribution(AFFINITY, (0, 1), score="gate", gate="softmax")
    with pytest.raises(ValueError, match=r"\(5, 4\) was not attributed"):
        small.value(small.affinity, (5, 4))


def test_a_file_restores_every_bit(measured: ExpertAttribution, tmp_path: Path) -> None:
    path = tmp_path / "attribution.json"
    measured.save(path)
    loaded = ExpertAttribution.load(path)
    assert torch.equal(loaded.affinity, measured.affinity)
    assert loaded.metadata() == measured.metadata()
    assert loaded.layer_indices == measured.layer_indices
    for use, other in ((loaded.forget, measured.forget), (loaded.retain, measured.retain)):
        assert use is not None
        assert other is not None
        for name in ("softmax", "applied", "token_ratio"):
            assert torch.equal(use.table(name), other.table(name))
    assert loaded.confidence is not None
    assert measured.confidence is not None
    assert torch.equal(loaded.confidence.low, measured.confidence.low)
    assert torch.equal(loaded.confidence.high, measured.confidence.high)
    assert loaded.confidence.margin_low == measured.confidence.margin_low
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_a_file_is_readable_and_says_where_it_comes_from(measured: ExpertAttribution, tmp_path: Path) -> None:
    path = tmp_path / "attribution.json"
    measured.save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 1
    assert content["score"] == "gate"
    assert content["forget"]["num_sequences"] == 23
    assert len(content["forget"]["fingerprint"]) == 16
    assert list(content["affinity"]) == ["0", "1", "2"]
    # One line a layer.
    assert max(len(line) for line in path.read_text().splitlines()) < 200
    assert json.loads(json.dumps(measured.metadata())) == measured.metadata()


def test_unmeasured_entries_survive_a_file(small: ExpertAttribution, tmp_path: Path) -> None:
    affinity = AFFINITY.clone()
    affinity[2] = torch.nan
    replace(small, affinity=affinity).save(tmp_path / "a.json")
    loaded = ExpertAttribution.load(tmp_path / "a.json")
    torch.testing.assert_close(loaded.affinity, affinity, rtol=0, atol=0, equal_nan=True)
    assert loaded.forget is loaded.confidence is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not an expert attribution"),
        ('{"format": "something else"}', "not an expert attribution"),
        ('{"format": "uoe_peft.expert_attribution", "version": 2}', "version 2, this package reads up to 1"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ExpertAttribution.load(path)


def test_rescoring_needs_what_the_pass_has_measured(measured: ExpertAttribution, small: ExpertAttribution) -> None:
    assert measured.forget is not None
    assert measured.retain is not None
    applied = measured.rescored("gate", gate="applied")
    assert torch.equal(applied.affinity, measured.forget.applied)
    assert applied.gate == "applied"
    contrast = measured.rescored("contrast")
    assert torch.equal(contrast.affinity, measured.forget.softmax - measured.retain.softmax)
    with pytest.raises(ValueError, match="call attribute_experts"):
        measured.rescored("ablation")
    with pytest.raises(ValueError, match="needs the forget set's routing"):
        small.rescored("token_ratio")
    with pytest.raises(ValueError, match="needs retain_dataset"):
        replace(measured, retain=None).rescored("contrast")


def test_the_summary_lists_the_best_experts_and_the_verdict(
    measured: ExpertAttribution, small: ExpertAttribution
) -> None:
    lines = measured.summary(num_experts=3).splitlines()
    layer_idx, expert_idx, affinity = measured.ranking()[0]
    assert lines[1].split()[:4] == ["rank", "layer", "expert", "affinity"]
    assert lines[2].split()[:4] == ["1", str(layer_idx), str(expert_idx), f"{affinity:.4f}"]
    assert lines[4].split()[0] == "3"
    assert "two halves of the data agree" in lines[6]
    assert "no data" in small.summary()


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn(measured: ExpertAttribution, small: ExpertAttribution, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    for name, attribution in (("measured", measured), ("small", small)):
        path = tmp_path / f"{name}.{ending}"
        attribution.plot(path, m=2)
        assert path.stat().st_size > 5_000


def test_without_matplotlib_the_error_names_the_extra(
    small: ExpertAttribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'uoe-peft\[plots\]'"):
        small.plot(tmp_path / "a.png")
