"""The statistics of one batch against sums over single tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from uoe_peft.attribution.scores import (
    STATISTICS,
    applied_gate,
    contrast,
    random_affinity,
    selection,
    sequence_means,
    softmax_gate,
)
from uoe_peft.moe.routing import LayerRouting

B, S, K, CLASSES = 2, 4, 3, 9
MASK = torch.tensor([[True, True, True, True], [False, True, True, False]])


@pytest.fixture
def routing() -> LayerRouting:
    """Nine router classes, one of which may compute nothing; padding holds NaN, a selection is cancelled."""
    scores = torch.rand(B * S, CLASSES).softmax(dim=-1)
    index = torch.stack([torch.randperm(CLASSES)[:K] for _ in range(B * S)])
    index[1] = torch.tensor([8, 0, 5])
    weights = torch.rand(B * S, K) + 0.1
    weights[2, 1] = 0
    for token in (4, 7):
        scores[token], weights[token] = math.nan, math.nan
    return LayerRouting(scores, index, weights.bfloat16())


def by_hand(routing: LayerRouting, num_experts: int) -> Tensor:
    means = torch.zeros(3, B, num_experts)
    for row in range(B):
        tokens = [row * S + place for place in range(S) if MASK[row, place]]
        for token in tokens:
            for expert, weight in zip(
                routing.top_k_index[token].tolist(), routing.top_k_weights[token].float(), strict=True
            ):
                if expert < num_experts and weight != 0:
                    share = torch.stack([routing.scores[token, expert], weight, torch.tensor(1 / K)])
                    means[:, row, expert] += share / len(tokens)
    return means


@pytest.mark.parametrize("num_experts", [CLASSES, CLASSES - 1, CLASSES + 2])
def test_each_expert_has_its_mean_over_the_tokens_that_count(routing: LayerRouting, num_experts: int) -> None:
    """With as many experts as classes, with a class that computes nothing, and with experts the router never names."""
    found = sequence_means(routing, MASK, num_experts=num_experts)
    assert STATISTICS == ("softmax", "applied", "token_ratio")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand(routing, num_experts))


def test_statistics_are_of_the_selected_experts(routing: LayerRouting) -> None:
    gate = softmax_gate(routing)
    for token in range(B * S):
        picked = [routing.scores[token, expert] for expert in routing.top_k_index[token].tolist()]
        torch.testing.assert_close(gate[token], torch.stack(picked), equal_nan=True)
    torch.testing.assert_close(applied_gate(routing), routing.top_k_weights.float(), equal_nan=True)
    assert applied_gate(routing).dtype == selection(routing).dtype == torch.float32
    assert torch.equal(selection(routing), torch.full((B * S, K), 1 / K))


def test_contrast_is_forget_minus_retain() -> None:
    forget, retain = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.125, 0.75]])
    assert contrast(forget, retain).tolist() == [[0.375, -0.5]]


def test_random_affinity_is_drawn_by_its_seed() -> None:
    drawn = random_affinity(3, 5, seed=4)
    assert drawn.shape == (3, 5)
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert drawn.unique().numel() == 15
    assert torch.equal(drawn, random_affinity(3, 5, seed=4))
    assert not torch.equal(drawn, random_affinity(3, 5, seed=5))
