"""Overlap, frequencies and divergence of routings equal hand-computed cases."""

from __future__ import annotations

import math

import pytest
import torch

from uoe_peft.moe.comparison import kl_divergence, selection_frequencies, top_k_jaccard, top_k_overlap

# Three tokens: same experts in another order, one in common, none.
FIRST = torch.tensor([[0, 1], [2, 3], [0, 4]])
SECOND = torch.tensor([[1, 0], [3, 4], [1, 2]])


def test_jaccard_and_overlap_of_three_tokens() -> None:
    assert top_k_jaccard(FIRST, SECOND, num_experts=5).item() == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert top_k_overlap(FIRST, SECOND, num_experts=5).item() == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_masked_tokens_do_not_count() -> None:
    mask = torch.tensor([[1, 1, 0]])
    assert top_k_jaccard(FIRST, SECOND, num_experts=5, mask=mask).item() == pytest.approx((1 + 1 / 3) / 2)
    frequencies = selection_frequencies(FIRST, num_experts=5, mask=mask)
    assert frequencies.tolist() == [0.25, 0.25, 0.25, 0.25, 0.0]


def test_frequencies_sum_to_one_and_count_selections() -> None:
    assert selection_frequencies(FIRST, num_experts=6).tolist() == pytest.approx([2 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 0])


def test_divergence_is_zero_for_equals_and_the_formula_otherwise() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    assert kl_divergence(p, p).item() == pytest.approx(0, abs=1e-7)
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2), abs=1e-6)
    # Never selected on one side: large, but finite.
    assert 1 < kl_divergence(q, p).item() < math.inf


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="0 to 3, got 0 to 4"):
        selection_frequencies(FIRST, num_experts=4)
    with pytest.raises(ValueError, match="no token counts"):
        selection_frequencies(FIRST, num_experts=5, mask=torch.zeros(3))
    with pytest.raises(ValueError, match="same tokens, got 3 and 2"):
        top_k_jaccard(FIRST, SECOND[:2], num_experts=5)
    with pytest.raises(ValueError, match="one entry for each of the 3 tokens"):
        top_k_jaccard(FIRST, SECOND, num_experts=5, mask=torch.ones(2))
    with pytest.raises(ValueError, match="same shape"):
        kl_divergence(torch.ones(2), torch.ones(3))
