"""Deltas without training: ridge regression from what forget tokens put into a slice to what should come out.

For a slice W, inputs K_f and K_r of forget and retain tokens (columns, weighted as the layer weights them) and outputs
T that the forget tokens should get:

    Δ = (T - W K_f) K_fᵀ / N_f (C_f + alpha C_r + beta λ̄ I)⁻¹

with C the second moments and λ̄ the mean eigenvalue of `C_f + alpha C_r`: as MEMIT (https://arxiv.org/abs/2210.07229)
writes facts, with the retain set beside. It needs moments alone, so that nothing grows with the number of tokens.

Letters: d input size of a slice, O output size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_peft.moments.moments import SliceMoments


def ridge_delta(
    change: Tensor, forget: SliceMoments, retain: SliceMoments, *, retain_weight: float, ridge: float
) -> Tensor:
    """The delta of a slice that changes forget tokens' outputs as asked and others' little.

    Args:
        change: `1/N_f Σ (T_t - W k_t) k_tᵀ` over the forget tokens, as :func:`steering_change` gives it; or the
            gradient of a loss with respect to the slice, where T goes up its slope. Shape `(O, d)`.
        forget: Moments of the forget set.
        retain: Moments of the retain set.
        retain_weight: alpha, >= 0: how much more retain tokens count than forget tokens.
        ridge: beta, > 0, as a share of the mean eigenvalue.

    Returns:
        Shape `(O, d)`, float64.

    Raises:
        ValueError: A number is out of range, shapes differ, or the moments are NaN, infinite or zero.
    """
    return torch.linalg.solve(_damped(forget, retain, retain_weight, ridge), change.double(), left=False)


def steering_change(
    weight: Tensor, forget: SliceMoments, *, direction: Tensor | None = None, coefficient: float = 0.0
) -> Tensor:
    """What :func:`ridge_delta` needs to send all forget tokens' outputs to one point.

    The point is `coefficient` times the root mean square norm of their outputs, along a direction.

    Args:
        weight: The slice, W. Shape `(O, d)`.
        forget: Moments of the forget set.
        direction: Unit vector, such as RMU's random one. Shape `(O,)`. None: the outputs should become 0.
        coefficient: >= 0.

    Returns:
        Shape `(O, d)`, float64.

    Raises:
        ValueError: Shapes differ, or the coefficient is negative.
    """
    if weight.shape[1] != forget.dimension:
        raise ValueError(f"the slice has {weight.shape[1]} inputs, the moments are of {forget.dimension}")
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"coefficient must be >= 0 and finite, got {coefficient}")
    matrix, second = weight.double().cpu(), forget.second.double()
    now = matrix @ second  # W C_f, (O, d)
    if direction is None:
        return -now
    if direction.shape != matrix.shape[:1]:
        raise ValueError(f"direction has shape {tuple(direction.shape)}, the slice has {len(matrix)} outputs")
    norm = float((now * matrix).sum().clamp(min=0).sqrt())  # the root of tr(W C_f Wᵀ)
    return coefficient * norm * torch.outer(direction.double().cpu(), forget.mean.double()) - now


def _damped(forget: SliceMoments, retain: SliceMoments, retain_weight: float, ridge: float) -> Tensor:
    """`C_f + alpha C_r + beta λ̄ I`. Shape `(d, d)`, float64."""
    if not 0 <= retain_weight < float("inf"):
        raise ValueError(f"retain_weight must be >= 0 and finite, got {retain_weight}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be > 0 and finite, got {ridge}")
    if forget.dimension != retain.dimension:
        raise ValueError(f"the moments are of {forget.dimension} and {retain.dimension} dimensions: of two slices")
    total = forget.second.double() + retain_weight * retain.second.double()
    scale = float(total.diagonal().mean())
    if not 0 < scale < float("inf"):
        raise ValueError("the moments are NaN, infinite or zero; measure them again, on other rows")
    total.diagonal().add_(ridge * scale)
    return total
