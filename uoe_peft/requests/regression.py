"""Adapters of several requests as one, by the closed form of EUL (https://arxiv.org/abs/2310.20150).

Every adapter should still do to the tokens of its own request what it does now. With the delta D_i of a slice and the
second moments C_i of what the N_i tokens of request i put into it, that is a regression:

    min_Δ Σ_i N_i E |Δ a - D_i a|²    =>    Δ = (Σ_i D_i N_i C_i) (Σ_i N_i C_i + ridge λ̄ I)⁻¹

with λ̄ the mean eigenvalue of `Σ_i N_i C_i`.
An adapter that does not edit a slice counts with `D_i = 0` where its moments are known, so that its request's tokens
are left alone there. Retain tokens are a further request whose delta is 0 everywhere.

Letters: d input size of a slice, O output size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from uoe_peft.moments import ROUTER, Moments, SliceMoments, SliceName
from uoe_peft.requests.stored_moments import load_forget_moments
from uoe_peft.training.optim.projection import edited_layers
from uoe_peft.tuner import UOEModel

_RETAIN = "(retain set)"


@torch.no_grad()
def add_regression_mean(
    model: PeftModel,
    adapters: Sequence[str],
    moments: Mapping[str, Moments | str | Path],
    adapter_name: str,
    *,
    retain: Moments | None = None,
    ridge: float = 1e-3,
) -> None:
    """Add an adapter that does to each request's tokens what that request's adapter does, as nearly as one can.

    Args:
        model: A model with UOE adapters.
        adapters: Names of the adapters, one for each request.
        moments: By adapter: `measure_moments` over its forget set, best of all experts that one of the adapters edits;
            or the adapter's folder, where moments were saved beside it.
        adapter_name: Name of the new adapter.
        retain: Moments of a retain set, whose tokens should be left alone; None: no such tokens.
        ridge: Damping, > 0, as a share of the mean eigenvalue.

    Raises:
        ValueError: As `UOEModel.add_weighted_adapter`; or moments of an adapter are missing, altogether or of a slice
            that it edits; they are of another width; or `ridge` is not positive.
        FileNotFoundError: A folder holds no moments.
        TypeError: The model has no UOE adapters.
    """
    tuner = model.base_model
    if not isinstance(tuner, UOEModel):
        raise TypeError(f"expected a model with UOE adapters, got {type(tuner).__name__}")
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge must be > 0 and finite, got {ridge}")
    missing = sorted(set(adapters) - set(moments))
    if missing:
        raise ValueError(f"no moments of the adapters {missing}; pass measure_moments(...) of each forget set")
    known: dict[str, Moments] = {name: load_forget_moments(moments[name]) for name in adapters}
    if retain is not None:
        known[_RETAIN] = retain
    means = []
    for layer, layer_idx, matrix in edited_layers(model):
        for (projection, index), names in layer.edited_keys(list(adapters)).items():
            name = SliceName(layer_idx, None if matrix == ROUTER else index, matrix or projection)
            turned = layer.is_transposed(projection)
            own = {a: layer.get_delta_weight(a, projection, index) for a in names}
            own = {a: delta.T if turned else delta for a, delta in own.items()}
            mean = regression_mean(own, _of_slice(known, name, needed=names), ridge=ridge)
            means.append((layer, projection, index, mean.T if turned else mean))
    # The deltas are of the kind that the sum's are, full or low-rank: a low-rank one holds the result exactly, since
    # each adapter's factors are multiplied from the side of the input alone.
    tuner.add_weighted_adapter(list(adapters), [1.0] * len(adapters), adapter_name)
    for layer, projection, index, mean in means:
        layer.set_delta_weight(adapter_name, projection, index, mean)


def regression_mean(deltas: Mapping[str, Tensor], moments: Mapping[str, SliceMoments], *, ridge: float) -> Tensor:
    """The delta of one slice that is nearest to what several deltas do, each to tokens of its own.

    Args:
        deltas: By request; one that is left out is 0. Shape `(O, d)` each.
        moments: By request, of all requests whose tokens count.
        ridge: Damping, > 0, as a share of the mean eigenvalue.

    Returns:
        Shape `(O, d)`, float64, on the deltas' device.

    Raises:
        ValueError: The widths differ, or the tokens put nothing into the slice.
    """
    like = next(iter(deltas.values()))
    width = like.shape[1]
    wrong = {name: own.dimension for name, own in moments.items() if own.dimension != width}
    if wrong:
        raise ValueError(f"moments are of the widths {wrong}, the slice's inputs of {width}: they are of another model")
    sums = {name: own.second.double().to(like.device) * own.num_tokens for name, own in moments.items()}
    total = torch.stack(list(sums.values())).sum(dim=0)
    scale = float(total.diagonal().mean())
    if not 0 < scale < float("inf"):
        raise ValueError(f"the tokens of {sorted(moments)} put nothing into the slice, or NaN; measure moments again")
    target = torch.stack([delta.double() @ sums[name] for name, delta in deltas.items()]).sum(dim=0)
    damped = total + ridge * scale * torch.eye(width, dtype=torch.float64, device=like.device)
    return torch.linalg.solve(damped, target, left=False)


def _of_slice(known: Mapping[str, Moments], name: SliceName, *, needed: Sequence[str]) -> dict[str, SliceMoments]:
    """Moments of one slice of all requests whose tokens reach it.

    Raises:
        ValueError: They are missing for an adapter that edits it.
    """
    found = {request: own.slices[name] for request, own in known.items() if name in own.slices}
    missing = sorted(set(needed) - set(found))
    if missing:
        raise ValueError(
            f"the moments of {missing} lack {name}, which these adapters edit; measure them over each forget set, for "
            "the experts of all adapters"
        )
    return found
