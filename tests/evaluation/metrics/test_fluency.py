"""Fluency by hand."""

from __future__ import annotations

import math

import pytest

from uoe_peft.evaluation.metrics import distinct_n, perplexity, repetition, rr2r, says_something_else


def test_repetition_is_what_is_not_distinct() -> None:
    assert distinct_n("the cat and the cat sat") == 4 / 5  # "the cat" twice
    assert distinct_n("la la la la", n=1) == 1 / 4
    assert repetition("la la la la") == pytest.approx(2 / 3)
    assert distinct_n("") == 1.0
    with pytest.raises(ValueError, match="n must be at least 1"):
        distinct_n("a b", n=0)


def test_perplexity_is_over_all_tokens_alike() -> None:
    assert perplexity([2.0, 10.0], [1, 5]) == pytest.approx(math.exp(2))
    assert perplexity([1e6], [1]) == math.inf
    with pytest.raises(ValueError, match="at least one token"):
        perplexity([], [])
    with pytest.raises(ValueError, match="got 1 likelihoods for 2 texts"):
        perplexity([1.0], [1, 2])


@pytest.mark.parametrize(
    ("recall", "repeated", "nats", "expected"),
    [(0.0, 0.0, 5.0, True), (0.9, 0.0, 5.0, False), (0.0, 0.9, 5.0, False), (0.0, 0.0, math.inf, False)],
)
def test_a_fluent_other_answer(recall: float, repeated: float, nats: float, expected: bool) -> None:
    assert says_something_else(recall, repeated, nats, max_perplexity=20.0) is expected


def test_rr2r_is_a_product_of_shares() -> None:
    assert rr2r([True, True, False, True], [False, True]) == pytest.approx(3 / 4 * 1 / 2)
    with pytest.raises(ValueError, match="got 2 and 0"):
        rr2r([True, True], [])
