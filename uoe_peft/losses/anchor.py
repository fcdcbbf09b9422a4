"""The anchor: forget tokens keep being routed to the expert that is being edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from uoe_peft.losses.answer_tokens import mean

AnchorReduction = Literal["token", "mean_gate"]


def anchor_loss(
    scores: Tensor,
    target_experts: Sequence[int],
    mask: Tensor,
    *,
    reduction: AnchorReduction = "token",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Router anchor loss of one layer on a forget batch.

    `mean_t ||s_t - a||_2^2`, Eq. 3 of https://arxiv.org/abs/2411.18797, with a the 0/1 vector of
    the layer's target experts. The paper leaves open whether s is cut to the top K and how tokens
    are reduced; here s is what is passed, and the default is the mean over tokens of the distance.

    Args:
        scores: s, router scores, sum 1 over experts; or `mask_to_top_k` of them. Shape `(T, E)`.
        target_experts: Indices of the layer's target experts.
        mask: True for tokens that count: the forget batch's tokens, padding excluded. Shape `(T,)`.
        reduction: "token", or "mean_gate": the distance of the mean score, `||mean_t s_t - a||^2`.
        denominator: Number of tokens to divide by, see `mean`; of no use with "mean_gate".

    Returns:
        Scalar, in [0, 2] for one target expert.

    Raises:
        ValueError: No target experts or one out of range, shapes that do not fit, an unknown
            `reduction`, or no token that counts.
    """
    target = _target_vector(scores, target_experts)
    if mask.shape != scores.shape[:1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(scores.shape[:1])}")
    counted = scores[mask.bool()]
    match reduction:
        case "token":
            return mean((counted - target).square().sum(dim=-1), denominator)
        case "mean_gate":
            if len(counted) == 0:
                raise ValueError("the anchor got no token that counts")
            return (counted.mean(dim=0) - target).square().sum()
        case _:
            raise ValueError(f"reduction must be 'token' or 'mean_gate', got {reduction!r}")


def mask_to_top_k(scores: Tensor, top_k_index: Tensor) -> Tensor:
    """The scores of the selected experts, 0 elsewhere: the paper's g.

    Args:
        scores: Shape `(T, E)`.
        top_k_index: Selected experts. Shape `(T, K)`.

    Returns:
        Shape `(T, E)`.
    """
    selected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, top_k_index, True)
    return scores * selected


def _target_vector(scores: Tensor, target_experts: Sequence[int]) -> Tensor:
    num_experts = scores.shape[-1]
    if not target_experts or not all(0 <= expert < num_experts for expert in target_experts):
        raise ValueError(f"target_experts must name experts 0 to {num_experts - 1}, got {list(target_experts)}")
    target = scores.new_zeros(num_experts)
    target[list(target_experts)] = 1
    return target
