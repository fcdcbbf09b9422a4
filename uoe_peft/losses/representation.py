"""Losses on hidden states: Representation Misdirection for Unlearning (RMU).

https://arxiv.org/abs/2403.03218. All means are over tokens *and* the hidden size H, token by token:
a masked mean that first averages within each example weighs the tokens of short answers more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_peft.losses.answer_tokens import mean


def control_direction(hidden_size: int, *, seed: int) -> Tensor:
    """The direction towards which RMU steers forget tokens: fixed, random, of length 1.

    Args:
        hidden_size: H.
        seed: The same seed gives the same direction on any device.

    Returns:
        float32 of shape `(H,)`, on the CPU; entries drawn uniformly from [0, 1), then normalised.
    """
    direction = torch.rand(hidden_size, generator=torch.Generator().manual_seed(seed))
    return direction / direction.norm()


def rmu_loss(
    hidden: Tensor,
    direction: Tensor,
    *,
    coefficient: float | Tensor,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Squared distance of forget tokens' hidden states from one far point.

    `mean_t ||h_t - c * u||^2 / H`.

    Args:
        hidden: Hidden states of forget tokens after the chosen layer. Shape `(N, H)`.
        direction: u, of length 1. Shape `(H,)`.
        coefficient: c: a number, or one for each token (adaptive RMU), shape `(N,)`.
        denominator: See `mean`.

    Returns:
        Scalar, not negative.

    Raises:
        ValueError: The shapes do not fit.
    """
    if direction.shape != hidden.shape[1:]:
        raise ValueError(
            f"direction has shape {tuple(direction.shape)}, expected {tuple(hidden.shape[1:])}, the hidden size"
        )
    direction = direction.to(hidden)
    if isinstance(coefficient, Tensor) and coefficient.dim() == 1:
        coefficient = coefficient.to(hidden)[:, None]
    return mean(_distance(hidden, coefficient * direction), denominator)


def adaptive_coefficient(ref_hidden: Tensor, *, beta: float) -> Tensor:
    """Adaptive RMU's steering coefficient: each token's own norm, scaled.

    `c_t = beta * ||h_ref_t||`, https://arxiv.org/abs/2408.06223. Deep layers have larger norms: a
    number that suits a layer does not suit another, a multiple of the norm does.

    Args:
        ref_hidden: Hidden states under the base model. Shape `(N, H)`.
        beta: > 0.

    Returns:
        Shape `(N,)`.

    Raises:
        ValueError: `beta` is not positive.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    return beta * ref_hidden.detach().norm(dim=-1)


def embed_diff_loss(hidden: Tensor, ref_hidden: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """RMU's retain term: squared distance of hidden states from the base model's.

    `mean_t ||h_t - h_ref_t||^2 / H`.

    Args:
        hidden: Hidden states of retain tokens after the chosen layer. Shape `(N, H)`.
        ref_hidden: The same under the base model, without gradient. Shape `(N, H)`.
        denominator: See `mean`.

    Returns:
        Scalar, not negative; 0 while the model equals the base model.

    Raises:
        ValueError: The shapes differ.
    """
    return mean(_distance(hidden, _same_tokens(hidden, ref_hidden)), denominator)


def relative_embed_diff_loss(
    hidden: Tensor, ref_hidden: Tensor, *, denominator: Tensor | float | None = None
) -> Tensor:
    """RMU's retain term in units of each token's own norm.

    `mean_t ||h_t - h_ref_t||^2 / ||h_ref_t||^2`: to `embed_diff_loss` what the adaptive coefficient
    (https://arxiv.org/abs/2408.06223) is to RMU's. Norms differ a hundredfold from model to model, from layer to layer,
    and from an attention sink to the next token; what reads a hidden state divides by its norm first.

    Args:
        hidden: Hidden states of retain tokens after the chosen layer. Shape `(N, H)`.
        ref_hidden: The same under the base model, without gradient. Shape `(N, H)`.
        denominator: See `mean`.

    Returns:
        Scalar, not negative, without unit; 0 while the model equals the base model, 1 where all hidden states are 0.

    Raises:
        ValueError: The shapes differ.
    """
    target = _same_tokens(hidden, ref_hidden)
    size = _distance(target, torch.zeros_like(target)).clamp(min=torch.finfo(torch.float32).tiny)
    return mean(_distance(hidden, target) / size, denominator)


def _same_tokens(hidden: Tensor, ref_hidden: Tensor) -> Tensor:
    if hidden.shape != ref_hidden.shape:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, ref_hidden {tuple(ref_hidden.shape)}; they "
            "must be of the same tokens"
        )
    return ref_hidden.detach().to(hidden.device)


def _distance(hidden: Tensor, target: Tensor) -> Tensor:
    # In float32: the square of a far point's coordinate overflows half precision.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(wide) - target.to(wide)).square().mean(dim=-1)
