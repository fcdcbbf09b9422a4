"""Forget quality and model utility against their definitions."""

from __future__ import annotations

import math
import sys
from itertools import product

import pytest
import torch

from uoe_peft.evaluation.metrics import forget_quality, model_utility, truth_ratio_score


def exact_ks_pvalue(one: list[float], other: list[float]) -> float:
    """The exact two-sided p-value: of all ways to deal the pooled values, the share with as great a distance."""
    pooled = sorted(one + other)

    def distance(first: list[float], second: list[float]) -> float:
        return max(
            abs(sum(v <= x for v in first) / len(first) - sum(v <= x for v in second) / len(second)) for x in pooled
        )

    seen = distance(one, other)
    deals = [deal for deal in product([0, 1], repeat=len(pooled)) if sum(deal) == len(one)]
    as_great = 0
    for deal in deals:
        first = [value for value, mine in zip(pooled, deal, strict=True) if mine]
        second = [value for value, mine in zip(pooled, deal, strict=True) if not mine]
        as_great += distance(first, second) >= seen - 1e-12
    return as_great / len(deals)


def test_forget_quality_equals_all_deals_counted() -> None:
    one, other = [0.1, 0.2, 0.9, 1.4, 0.35], [0.8, 1.1, 2.0, 1.7, 1.3, 0.95]
    assert forget_quality(one, other) == pytest.approx(exact_ks_pvalue(one, other), abs=1e-6)
    assert forget_quality(one, one) == 1.0


@pytest.mark.parametrize("ratios", [[], [1.0, math.nan]])
def test_ratios_that_say_nothing_are_refused(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="retrained must hold at least one truth ratio"):
        forget_quality([1.0], ratios)


def test_a_missing_test_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"uoe-peft\[eval\]"):
        forget_quality([1.0], [1.0])


def test_model_utility_is_a_harmonic_mean() -> None:
    assert model_utility([0.5, 0.25, 1.0]) == pytest.approx(3 / (2 + 4 + 1))
    assert model_utility([0.5, 0.0]) == 0.0
    assert model_utility(torch.tensor([0.2, 0.2]).tolist()) == pytest.approx(0.2)


@pytest.mark.parametrize("scores", [[], [0.5, 1.5], [math.nan]])
def test_utility_of_no_scores_is_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        model_utility(scores)


@pytest.mark.parametrize(
    ("ratio", "forgotten", "kept"), [(0.0, 0.0, 1.0), (0.25, 0.25, 0.75), (1.0, 1.0, 0.0), (4.0, 0.25, 0.0)]
)
def test_a_ratio_as_a_score(ratio: float, forgotten: float, kept: float) -> None:
    assert truth_ratio_score(ratio, "closer_to_1_better") == forgotten
    assert truth_ratio_score(ratio, "true_better") == kept


def test_a_ratio_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0, got nan"):
        truth_ratio_score(math.nan, "true_better")
    with pytest.raises(ValueError, match="better must be"):
        truth_ratio_score(0.5, "worse")  # type: ignore[arg-type]
