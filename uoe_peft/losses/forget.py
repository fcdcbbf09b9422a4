"""Forget losses on answer tokens: gradient ascent and its relatives, relabelling, distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_peft.losses.answer_tokens import TokenReduction, mean, reduce_tokens


def grad_ascent_loss(log_probs: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """Minus the cross-entropy of a forget batch: descending it is ascending the ordinary loss.

    `-CE = mean_t log p_t` (GA; with the retain loss `nll` it is GradDiff). Unbounded below.

    Args:
        log_probs: Of the answer tokens. Shape `(N,)`.
        denominator: See `mean`.

    Returns:
        Scalar, not positive.
    """
    return mean(log_probs, denominator)


def wga_loss(log_probs: Tensor, *, beta: float = 1.0, denominator: Tensor | float | None = None) -> Tensor:
    """Weighted gradient ascent: tokens that the model has already lost count less.

    `-mean_t stopgrad(p_t)^beta * CE_t`, https://arxiv.org/abs/2502.19301.

    Args:
        log_probs: Of the answer tokens. Shape `(N,)`.
        beta: >= 0. At 0 this is gradient ascent.
        denominator: See `mean`.

    Returns:
        Scalar, not positive.

    Raises:
        ValueError: `beta` is negative.
    """
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    return mean((beta * log_probs.detach()).exp() * log_probs, denominator)


def satimp_loss(
    log_probs: Tensor,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Gradient ascent weighted by saturation (not yet forgotten) and importance (hard to say).

    `-mean_t stopgrad(p_t)^beta1 * (1 - stopgrad(p_t))^beta2 * CE_t`,
    https://arxiv.org/abs/2505.11953.

    Args:
        log_probs: Of the answer tokens. Shape `(N,)`.
        beta1: >= 0. With `beta2` 0 this is `wga_loss`.
        beta2: >= 0.
        denominator: See `mean`.

    Returns:
        Scalar, not positive.

    Raises:
        ValueError: A beta is negative.
    """
    if beta1 < 0 or beta2 < 0:
        raise ValueError(f"beta1 and beta2 must be >= 0, got {beta1} and {beta2}")
    p = log_probs.detach().exp()
    return mean(p**beta1 * (1 - p) ** beta2 * log_probs, denominator)


def random_labels(lengths: Sequence[int], *, vocab_size: int, seeds: Sequence[int]) -> Tensor:
    """Uniformly random tokens in place of the answers' own.

    For `nll_loss`, as "fitting to randomly sampled labels", https://arxiv.org/abs/2402.15159. What is
    drawn for an answer depends on its own seed alone, not on the batch that it is in.

    Args:
        lengths: Number of tokens of each answer, N in all.
        vocab_size: V.
        seeds: Of each answer.

    Returns:
        Token ids, 0 to V - 1, on the CPU. int64, shape `(N,)`.

    Raises:
        ValueError: `lengths` and `seeds` are not of the same answers.
    """
    generator = torch.Generator()
    return torch.cat(
        [
            torch.randint(vocab_size, (length,), generator=generator.manual_seed(seed))
            for length, seed in zip(lengths, seeds, strict=True)
        ]
    )


def adversarial_labels(logits: Tensor, targets: Tensor) -> Tensor:
    """The model's own most likely *wrong* token in place of each answer token.

    For `nll_loss`, as "fitting to adversarial labels", https://arxiv.org/abs/2402.15159.

    Args:
        logits: Shape `(N, V)`.
        targets: The answer tokens. Shape `(N,)`.

    Returns:
        Token ids, none equal to its target. Shape `(N,)`.
    """
    return logits.detach().scatter(1, targets[:, None], float("-inf")).argmax(dim=1)


def undial_loss(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    *,
    beta: float = 10.0,
    reduction: TokenReduction = "mean",
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Distillation from the base model with the answer token's logit lowered.

    `mean_t CE(softmax(z_t), softmax(z_ref_t - beta * onehot(y_t)))`: the second argument is the
    teacher, https://arxiv.org/abs/2402.10052.

    Args:
        logits: Of the model. Shape `(N, V)`.
        ref_logits: Of the base model, without gradient. Shape `(N, V)`.
        targets: The answer tokens. Shape `(N,)`.
        beta: How far the answer's logit is lowered, >= 0. At 0 this is plain distillation.
        reduction: "mean" over tokens, or "none": each token's cross-entropy.
        denominator: Of "mean", see `mean`.

    Returns:
        Not negative; its minimum is the teacher's entropy. Scalar, or shape `(N,)`.

    Raises:
        ValueError: `beta` is negative, the logits' shapes differ, or an unknown `reduction`.
    """
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, ref_logits {tuple(ref_logits.shape)}; "
            "they must be of the same tokens"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    penalty = torch.zeros_like(wide).scatter_(1, targets[:, None], beta)
    teacher = F.softmax(ref_logits.detach().to(wide.dtype) - penalty, dim=-1)
    return reduce_tokens(F.cross_entropy(wide, teacher, reduction="none"), reduction, denominator)
