"""The two metrics against values worked out by hand."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from uoe_peft.evaluation.metrics import answer_probability, rouge_l_recall


def logits_giving(probabilities: list[float], *, vocab_size: int = 5) -> torch.Tensor:
    """Logits `(1, len(probabilities) + 1, V)` that give token 2 these probabilities, the others the rest evenly."""
    rows = []
    for p in probabilities:
        row = torch.full((vocab_size,), (1 - p) / (vocab_size - 1)).log()
        row[2] = math.log(p)
        rows.append(row)
    return torch.stack([*rows, torch.zeros(vocab_size)])[None]


def test_probability_is_the_geometric_mean_over_the_answer() -> None:
    probability = answer_probability(logits_giving([0.5, 0.125]), torch.tensor([[2, 2, 2]]))
    assert probability.item() == pytest.approx(0.25)


def test_prompt_and_padding_do_not_count() -> None:
    logits = logits_giving([0.9, 0.5, 0.125, 0.01])
    assert answer_probability(logits, torch.tensor([[2, -100, 2, 2, -100]])).item() == pytest.approx(0.25)


def test_a_model_that_knows_nothing_gives_one_over_the_vocabulary() -> None:
    probability = answer_probability(
        torch.zeros(2, 4, 7, dtype=torch.bfloat16), torch.tensor([[1, 2, 3, 4], [-100, 5, 6, 0]])
    )
    assert probability.dtype == torch.float32
    torch.testing.assert_close(probability, torch.full((2,), 1 / 7))


def test_a_row_without_answer_is_named() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\] have no answer token"):
        answer_probability(torch.zeros(2, 3, 7), torch.tensor([[0, 1, 2], [4, -100, -100]]))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 7\) and \(2, 4\)"):
        answer_probability(torch.zeros(2, 3, 7), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("prediction", "recall"),
    [
        ("a red tower by the sea", 1.0),
        ("so I say: A RED TOWER, by the sea, and much more besides", 1.0),
        ("red sea", 2 / 6),
        ("sea red", 1 / 6),  # the order counts
        ("reds towers by a sea", 4 / 6),  # words are stemmed; "a" stands too late
        ("", 0.0),
    ],
)
def test_recall_is_the_share_of_the_reference_in_its_order(prediction: str, recall: float) -> None:
    assert rouge_l_recall([prediction], ["A red tower by the sea"]) == pytest.approx([recall])


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        rouge_l_recall(["a", "b"], ["a"])


def test_a_missing_scorer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"uoe-peft\[eval\]"):
        rouge_l_recall(["a"], ["a"])
