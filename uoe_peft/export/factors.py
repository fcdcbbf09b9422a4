"""Low-rank factors of deltas: exact where the delta has them, else the nearest of a rank or within an error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uoe_peft.export.edits import SliceEdit
from uoe_peft.export.saved_adapter import all_finite


@dataclass(frozen=True)
class Factors:
    """A delta as a product, `scale * left @ right`.

    Attributes:
        edit: The slice.
        left: Shape `(rows, R)`.
        right: Shape `(R, columns)`.
        scale: Kept apart, so that the product is rounded as it is in the adapter.
        error: Norm of what is missing by the norm of the delta (Frobenius), 0 where nothing is.
    """

    edit: SliceEdit
    left: Tensor
    right: Tensor
    scale: float
    error: float

    @property
    def rank(self) -> int:
        """R."""
        return self.left.shape[1]


def factorise(edit: SliceEdit, *, rank: int | None, max_error: float | None) -> Factors:
    """Factors of a slice's delta.

    Args:
        edit: The slice.
        rank: The most that they may have; None: as many as needed.
        max_error: The largest relative error, in Frobenius norm; None: none but rounding.

    Returns:
        Factors in float32. A low-rank delta that need not be cut, and a router's, are exact.

    Raises:
        ValueError: The delta is not finite; or it is a full delta of an expert and neither limit is given.
    """
    if edit.delta.is_low_rank:
        left, right = (part.float() for part in edit.delta.factors(edit.position, transposed=edit.transposed))
        delta = left @ right * edit.delta.scale
        _check_finite(edit, delta)
        if rank is None or rank >= edit.delta.rank:
            return Factors(edit, left, right, edit.delta.scale, 0.0)
        return _nearest(edit, delta, rank=rank, max_error=max_error)
    delta = edit.delta.dense(edit.position, transposed=edit.transposed)
    _check_finite(edit, delta)
    if edit.expert_idx is None:  # as many rows as experts: the identity times the delta is small, and exact
        return Factors(edit, torch.eye(len(delta)), delta, 1.0, 0.0)
    if rank is None and max_error is None:
        raise ValueError(
            f"the delta of {edit.projection} of expert {edit.expert_idx} in layer {edit.layer_idx} is a full one, "
            "which LoRA cannot hold exactly: ship the merged weights (merge_checkpoint), or name a rank or a max_error"
        )
    return _nearest(edit, delta, rank=rank, max_error=max_error)


def _nearest(edit: SliceEdit, delta: Tensor, *, rank: int | None, max_error: float | None) -> Factors:
    """The nearest matrix of a rank, by singular values (Eckart-Young)."""
    left, singular, right = torch.linalg.svd(delta, full_matrices=False)
    energy = singular.double().square()
    # What is missing after each number of singular values, from none to all of them.
    missing = (energy.sum() - torch.cat([energy.new_zeros(1), energy.cumsum(0)])).clamp(min=0).sqrt()
    errors = missing / energy.sum().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    needed = int((errors > (max_error or 0.0)).sum()) if max_error is not None else len(singular)
    kept = max(1, min(needed, rank if rank is not None else needed, len(singular)))
    if max_error is not None and errors[kept] > max_error:
        raise ValueError(
            f"rank {rank} leaves an error of {float(errors[kept]):.3g} in {edit.projection} of expert "
            f"{edit.expert_idx}, more than max_error={max_error}; it takes rank {needed}"
        )
    root = singular[:kept].sqrt()
    return Factors(edit, left[:, :kept] * root, root[:, None] * right[:kept], 1.0, float(errors[kept]))


def _check_finite(edit: SliceEdit, delta: Tensor) -> None:
    if not all_finite(delta):
        raise ValueError(f"the delta of {edit.target.parameter} has values that are not finite: the adapter is broken")
