"""Retain losses: what keeps the rest of the model as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_peft.losses.answer_tokens import TokenReduction, mean, reduce_tokens


def nll_loss(
    log_probs: Tensor,
    *,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy: `mean_t w_t * CE_t`.

    Args:
        log_probs: Of the answer tokens. Shape `(N,)`.
        weights: w, of each token; None for 1. Shape `(N,)`.
        denominator: See `mean`.

    Returns:
        Scalar, not negative, in nats.
    """
    return mean(-log_probs if weights is None else -log_probs * weights, denominator)


def kl_loss(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    reduction: TokenReduction = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the model from the base model, over answer tokens.

    `mean_t sum_v p_ref(v) * (log p_ref(v) - log p(v))`, that is `KL(p_ref || p)`.

    Args:
        logits: Of the model. Shape `(N, V)`.
        ref_logits: Of the base model, without gradient. Shape `(N, V)`.
        reduction: "mean" over tokens, or "none": each token's divergence.
        denominator: Of "mean", see `mean`.

    Returns:
        Not negative; 0 while the model equals the base model. Scalar, or shape `(N,)`.

    Raises:
        ValueError: The shapes differ, or an unknown `reduction`.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, ref_logits {tuple(ref_logits.shape)}; "
            "they must be of the same tokens"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = F.log_softmax(logits.to(wide), dim=-1)
    log_p_ref = F.log_softmax(ref_logits.detach().to(wide), dim=-1)
    return reduce_tokens((log_p_ref.exp() * (log_p_ref - log_p)).sum(dim=-1), reduction, denominator)


def trace_weights(routed: Tensor, forget_rate: Tensor, retain_rate: Tensor, *, cap: float = 10.0) -> Tensor:
    """Weights of retain tokens: those that reach an edited expert count more.

    `w_t = 1 + sum over target experts e routed at t of (min(f_e^F / f_e^R, cap) - 1)`, normalised
    to mean 1, where f_e is the share of forget (F) or retain (R) tokens that select expert e. Tokens
    that reach several experts which retain tokens use more would get a weight below 0: they get 0.
    The idea is TRACE's, https://arxiv.org/abs/2606.10338; the formula is a reconstruction from its
    abstract.

    Args:
        routed: Whether token t selects target expert e. Bool, shape `(N, M)`.
        forget_rate: f^F of the M target experts, in [0, 1]. Shape `(M,)`.
        retain_rate: f^R. Shape `(M,)`.
        cap: Largest ratio, >= 1.

    Returns:
        float32, not negative, mean 1. Shape `(N,)`.

    Raises:
        ValueError: `cap` is below 1.
    """
    if cap < 1:
        raise ValueError(f"cap must be >= 1, got {cap}")
    # An expert that no retain token selects would divide by zero; then no weight uses its ratio.
    smallest = torch.finfo(torch.float32).tiny
    ratio = (forget_rate.float() / retain_rate.float().clamp(min=smallest)).clamp(max=cap)
    weights = (1 + (routed.float() * (ratio - 1)).sum(dim=-1)).clamp(min=0)
    return weights / weights.mean().clamp(min=smallest)
