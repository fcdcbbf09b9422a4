"""Deltas that retain tokens hardly see: a projection of what a slice's delta is multiplied with.

`Δ = D P` with `P = (I + C / (rho λ̄))⁻¹`: D is what is trained, C are the second moments of retain tokens, λ̄ is the mean
of its eigenvalues. A direction of eigenvalue λ is damped by `1 / (1 + λ / (rho λ̄))`. As rho grows that is no projection
at all, as it falls to 0 the null space of the retain tokens, as in AlphaEdit (https://arxiv.org/abs/2410.02355).

Letters: d input size of a slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_peft.moments.moments import SliceMoments


def retain_projection(retain: SliceMoments, rho: float) -> Tensor:
    """`P = (I + C / (rho λ̄))⁻¹`, what a delta's inputs are multiplied with.

    Args:
        retain: Moments of the retain set.
        rho: > 0; the smaller, the less a delta does to retain tokens.

    Returns:
        Shape `(d, d)`, float64, symmetric, with eigenvalues in (0, 1].

    Raises:
        ValueError: `rho` is not positive, or the moments are NaN, infinite or zero.
    """
    if not 0 < rho < float("inf"):
        raise ValueError(f"rho must be > 0 and finite, got {rho}")
    scale = retain.mean_eigenvalue
    if not torch.isfinite(retain.second).all():
        raise ValueError("the moments of the retain set are NaN or infinite; measure them again")
    if not scale > 0:
        raise ValueError(
            f"the {retain.num_tokens} retain tokens put nothing into the slice, so that there is nothing to keep a "
            "delta from; pass other retain rows"
        )
    inverse = torch.eye(retain.dimension, dtype=torch.float64) + retain.second.double() / (rho * scale)
    projection = torch.linalg.inv(inverse)
    return (projection + projection.T) / 2


def surviving_share(forget: SliceMoments, projection: Tensor) -> float:
    """Share of the forget tokens' energy that a projection lets through, `tr(P C_f P) / tr(C_f)`, in [0, 1].

    Says before training how much a projected delta has to work with: near 0, forget tokens look to the slice like
    retain tokens, and a projection cannot tell them apart.

    Args:
        forget: Moments of the forget set.
        projection: As :func:`retain_projection` gives it. Shape `(d, d)`.

    Raises:
        ValueError: The shapes differ.
    """
    if projection.shape != forget.second.shape:
        shapes = f"{tuple(projection.shape)} and {tuple(forget.second.shape)}"
        raise ValueError(f"projection and moments have the shapes {shapes}, expected equal ones")
    second = forget.second.double()
    energy = float(second.diagonal().sum())
    passed = float((projection.double() @ second @ projection.double()).diagonal().sum())
    return passed / energy if energy > 0 else 0.0
