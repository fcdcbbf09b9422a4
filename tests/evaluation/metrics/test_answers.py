"""Metrics of answers against values worked out by hand, and against plain loops."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from uoe_peft.evaluation.metrics import (
    answer_probability,
    answer_tokens,
    exact_memorization,
    extraction_strength,
    probability_w_options,
    rouge_l_recall,
    truth_ratio,
)


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


def test_token_statistics_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uoe_peft.evaluation.metrics.answers._MAX_VALUES", 15)  # two tokens of seven words at a time
    logits = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([[9, -100, 1, 2, 3, -100], [-100, -100, -100, -100, -100, 6], [0, 1, 2, 3, 4, 5]])
    found = answer_tokens(logits, labels)
    assert [len(tokens.log_probs) for tokens in found] == [3, 1, 5]
    for row, tokens in enumerate(found):
        places = [s for s in range(1, 6) if labels[row, s] != -100]
        for place, log_prob, is_argmax, score in zip(
            places, tokens.log_probs, tokens.is_argmax, tokens.standardised, strict=True
        ):
            p = [math.exp(value) for value in logits[row, place - 1].tolist()]
            p = [value / sum(p) for value in p]
            target = int(labels[row, place])
            mean = sum(q * math.log(q) for q in p)
            deviation = math.sqrt(sum(q * (math.log(q) - mean) ** 2 for q in p))
            assert log_prob.item() == pytest.approx(math.log(p[target]), abs=1e-5)
            assert bool(is_argmax) == (max(p) == p[target])
            assert score.item() == pytest.approx((math.log(p[target]) - mean) / deviation, abs=1e-4)


def test_words_that_a_model_rules_out_do_not_count() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0, -math.inf], [0.0, 0.0, 0.0, 0.0]]])
    tokens = answer_tokens(logits, torch.tensor([[-100, 2]]))[0]
    without = answer_tokens(logits[..., :3], torch.tensor([[-100, 2]]))[0]
    assert torch.equal(tokens.log_probs, without.log_probs)
    assert tokens.standardised.item() == pytest.approx(without.standardised.item())


@pytest.mark.parametrize(("broken", "label"), [(math.nan, 1), (math.inf, 1), (-math.inf, 0)])
def test_logits_that_are_no_numbers_are_named(broken: float, label: int) -> None:
    logits = torch.zeros(2, 3, 4)
    logits[1, 0, 0] = broken
    with pytest.raises(ValueError, match=r"logits of rows \[1\] are not finite"):
        answer_tokens(logits, torch.tensor([[-100, 1, 2], [-100, label, 2]]))


@pytest.mark.parametrize(
    ("hits", "memorised", "strength"),
    [
        ("1111", 1.0, 1.0),
        ("0111", 3 / 4, 3 / 4),
        ("1011", 3 / 4, 2 / 4),
        ("1110", 3 / 4, 0.0),  # the last token is not said: nothing is extracted
        ("0000", 0.0, 0.0),
        ("1", 1.0, 1.0),
        ("0", 0.0, 0.0),
    ],
)
def test_memorisation_by_hand(hits: str, memorised: float, strength: float) -> None:
    is_argmax = torch.tensor([hit == "1" for hit in hits])
    assert exact_memorization(is_argmax) == pytest.approx(memorised)
    assert extraction_strength(is_argmax) == pytest.approx(strength)


@pytest.mark.parametrize("metric", [exact_memorization, extraction_strength])
def test_no_tokens_are_refused(metric: object) -> None:
    with pytest.raises(ValueError, match="T >= 1"):
        metric(torch.zeros(0, dtype=torch.bool))  # type: ignore[operator]


def test_truth_ratio_is_of_geometric_means() -> None:
    # P(true) = 0.5, P(false) = 0.25 and 0.0625: their geometric mean is 0.125.
    ratio = truth_ratio(math.log(2), [math.log(4), math.log(16)])
    assert ratio == pytest.approx(0.125 / 0.5)
    assert truth_ratio(5000.0, [1.0]) < math.inf
    with pytest.raises(ValueError, match="at least one false answer"):
        truth_ratio(1.0, [])


def test_probability_among_options_by_hand() -> None:
    assert probability_w_options(math.log(2), [math.log(4), math.log(16)]) == pytest.approx(0.5 / (0.5 + 0.25 + 0.0625))
    assert probability_w_options(4000.0, [4000.0, 4000.0, 4000.0]) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="at least one false answer"):
        probability_w_options(1.0, [])


def test_empty_generation_recalls_nothing() -> None:
    assert rouge_l_recall(["", "x"], ["a b", ""]) == [0.0, 0.0]
