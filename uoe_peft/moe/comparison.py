"""How far two routings of the same tokens agree: pure functions of tensors.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_jaccard(top_k_index: Tensor, other_index: Tensor, *, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Jaccard similarity of the experts that two models select for the same tokens, mean over tokens.

    `|A ∩ B| / |A ∪ B|`, the overlap measure of Fig. 3a of https://arxiv.org/abs/2411.18797.

    Args:
        top_k_index: Selected experts. Shape `(T, K)`.
        other_index: The other model's. Shape `(T, K)`.
        num_experts: E.
        mask: Tokens that count; None for all. Shape `(T,)` or `(B, S)`.

    Returns:
        Scalar in [0, 1].

    Raises:
        ValueError: The numbers of tokens differ, an index is out of range, or no token counts.
    """
    both, either = _common_and_all(top_k_index, other_index, num_experts=num_experts)
    return _token_mean(both / either, mask)


def top_k_overlap(top_k_index: Tensor, other_index: Tensor, *, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Share of the selected experts that the other model selects too, mean over tokens.

    `|A ∩ B| / K`. Arguments, result and errors as in `top_k_jaccard`.
    """
    both, _ = _common_and_all(top_k_index, other_index, num_experts=num_experts)
    return _token_mean(both / top_k_index.shape[-1], mask)


def selection_frequencies(top_k_index: Tensor, *, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Share of all selections that fall on each expert.

    Times K it is the share of tokens that reach the expert: Fig. 2 of https://arxiv.org/abs/2411.18797.

    Args:
        top_k_index: Selected experts. Shape `(T, K)`.
        num_experts: E.
        mask: Tokens that count; None for all. Shape `(T,)` or `(B, S)`.

    Returns:
        Sum 1. Shape `(E,)`, float32.

    Raises:
        ValueError: An index is out of range, or no token counts.
    """
    selected = _one_hot(top_k_index, num_experts).float()
    counts = selected[_flat_mask(mask, selected)].sum(dim=0)
    return counts / counts.sum()


def kl_divergence(p: Tensor, q: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Kullback-Leibler divergence of two distributions over experts, `sum_i p_i log(p_i / q_i)`.

    Args:
        p: Frequencies or scores, >= 0, sum 1 over the last dimension. Shape `(..., E)`.
        q: The distribution that is compared with. Shape `(..., E)`.
        epsilon: Added to both before they are normalised anew, so that an expert that one side never selects costs
            much rather than infinitely much.

    Returns:
        In nats, >= 0. Shape `(...)`.

    Raises:
        ValueError: The shapes differ.
    """
    if p.shape != q.shape:
        raise ValueError(f"p and q must have the same shape, got {tuple(p.shape)} and {tuple(q.shape)}")
    p, q = p + epsilon, q + epsilon
    p, q = p / p.sum(dim=-1, keepdim=True), q / q.sum(dim=-1, keepdim=True)
    return (p * (p / q).log()).sum(dim=-1)


def _common_and_all(index: Tensor, other: Tensor, *, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sizes of intersection and union of each token's selected experts. Shape `(T,)` each."""
    first, second = _one_hot(index, num_experts), _one_hot(other, num_experts)
    if len(first) != len(second):
        raise ValueError(f"both routings must be of the same tokens, got {len(first)} and {len(second)}")
    return (first & second).sum(dim=-1).float(), (first | second).sum(dim=-1).float()


def _one_hot(index: Tensor, num_experts: int) -> Tensor:
    flat = index.reshape(-1, index.shape[-1])
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_experts:
        raise ValueError(f"expert indices must be 0 to {num_experts - 1}, got {int(flat.min())} to {int(flat.max())}")
    return torch.zeros(len(flat), num_experts, dtype=torch.bool, device=flat.device).scatter_(1, flat, True)


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return values[_flat_mask(mask, values)].mean()


def _flat_mask(mask: Tensor | None, values: Tensor) -> Tensor:
    if mask is None:
        flat = torch.ones(len(values), dtype=torch.bool, device=values.device)
    else:
        flat = mask.reshape(-1).to(values.device).bool()
    if len(flat) != len(values):
        raise ValueError(f"mask must have one entry for each of the {len(values)} tokens, got {len(flat)}")
    if not flat.any():
        raise ValueError("no token counts: the mask is 0 everywhere")
    return flat
