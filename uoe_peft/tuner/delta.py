"""Deltas of slices: their parameters, their scale, and what a slice is with them.

Letters: E experts of a layer, M of them edited by an adapter, N tokens routed to one expert, H hidden size, R rank.
A *slice* is what one expert contributes to a stacked parameter, or the router's whole matrix.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from uoe_peft.tuner.combining import Combine
from uoe_peft.tuner.config import UOEConfig

SliceKey = tuple[str, int]  # (projection, expert_idx)


class DeltaLayer(nn.Module, BaseTunerLayer):
    """Deltas of single slices of one module, for any number of adapters.

    An adapter's delta of a projection is one parameter for all the experts that it edits here: `uoe_delta`, shape
    `(M, *slice)`, or the factors `uoe_A`, shape `(M, R, in)`, and `uoe_B`, shape `(M, out, R)`.
    """

    adapter_layer_names = ("uoe_delta", "uoe_A", "uoe_B")
    other_param_names = ("scaling", "low_rank_scaling", "strength", "relative_scale", "target_indices")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.uoe_delta = nn.ModuleDict()
        self.uoe_A = nn.ModuleDict()
        self.uoe_B = nn.ModuleDict()
        self.scaling: dict[str, float] = {}  # the product of the three that follow
        self.low_rank_scaling: dict[str, float] = {}
        self.strength: dict[str, float] = {}
        self.relative_scale: dict[str, float] = {}  # what set_scale, scale_layer and unscale_layer change
        self.target_indices: dict[str, list[int]] = {}
        self._active_adapter = adapter_name
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Any:
        """Whatever the wrapper lacks is the wrapped module's: blocks read sizes and flags from what they call."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return self._read(self.base_layer, name)

    def _read(self, base_layer: nn.Module, name: str) -> Any:
        """An attribute of the wrapped module, as others read it through the wrapper."""
        return getattr(base_layer, name)

    @abstractmethod
    def base_parameter(self, projection: str, index: int) -> Tensor:
        """The parameter that holds the slice."""

    @abstractmethod
    def base_slice(self, projection: str, index: int) -> Tensor:
        """The slice as it lies in memory: a view, so that writing to it edits the model."""

    def original_slice(self, key: SliceKey) -> Tensor:
        """The slice as it is without any adapter."""
        return self.base_slice(*key)

    def slice_shape(self, projection: str, index: int) -> tuple[int, int]:
        """Rows and columns of the slice."""
        rows, columns = self.base_slice(projection, index).shape
        return rows, columns

    def is_transposed(self, projection: str) -> bool:
        """Whether :meth:`base_slice` has shape `(in, out)` rather than `(out, in)`."""
        return False

    def update_layer(
        self,
        adapter_name: str,
        config: UOEConfig,
        *,
        projections: Sequence[str],
        indices: Sequence[int],
        delta_type: str,
    ) -> None:
        """Add an adapter that edits the given slices.

        Args:
            adapter_name: Name of the adapter, new to this layer.
            config: Ranks, scales and initialisation.
            projections: Which projections get a delta.
            indices: Which experts get a delta, M of them, in ascending order.
            delta_type: "full" or "low_rank".
        """
        self.target_indices[adapter_name] = list(indices)
        low_rank_scale = config.uoe_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.low_rank_scaling[adapter_name] = low_rank_scale if delta_type == "low_rank" else 1.0
        self.relative_scale[adapter_name] = 1.0
        self.set_strength(adapter_name, config.strength)
        if delta_type == "low_rank":
            sizes = {p: self._in_out(p, indices[0]) for p in projections}
            factors_a = _stacks(len(indices), {p: (config.r, size[0]) for p, size in sizes.items()})
            factors_b = _stacks(len(indices), {p: (size[1], config.r) for p, size in sizes.items()})
            self.uoe_A[adapter_name] = nn.ParameterDict(factors_a)
            self.uoe_B[adapter_name] = nn.ParameterDict(factors_b)
        else:
            deltas = _stacks(len(indices), {p: self.slice_shape(p, indices[0]) for p in projections})
            self.uoe_delta[adapter_name] = nn.ParameterDict(deltas)
        self.reset_uoe_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _in_out(self, projection: str, index: int) -> tuple[int, int]:
        rows, columns = self.slice_shape(projection, index)
        return (rows, columns) if self.is_transposed(projection) else (columns, rows)

    @torch.no_grad()
    def reset_uoe_parameters(self, adapter_name: str, init_weights: bool | str) -> None:
        """Initialise an adapter: see `init_weights` of :class:`UOEConfig`."""
        for factors in (d[adapter_name] for d in (self.uoe_delta, self.uoe_A, self.uoe_B) if adapter_name in d):
            for parameter in cast(nn.ParameterDict, factors).values():
                # The standard deviation keeps the output of a random delta near that of the slice, whatever its size.
                random = init_weights is False or factors is self.uoe_A._modules.get(adapter_name)
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5) if random else nn.init.zeros_(parameter)
        if init_weights == "zero_expert":
            self._cancel_last_projection(adapter_name)

    def _cancel_last_projection(self, adapter_name: str) -> None:
        """Make the edited experts contribute nothing; a router, which can do no such thing, stays as it is."""

    @torch.no_grad()
    def set_combination(self, adapter_name: str, weights: Mapping[str, float], *, combine: Combine | None) -> None:
        """Set a fresh adapter's deltas to what others' deltas of the same slices become, computed in float32.

        Args:
            adapter_name: Name of the adapter to set.
            weights: A weight for each of the other adapters.
            combine: See `Combine`. None: the exact sum of low-rank deltas, whose ranks the adapter's holds.
        """
        for key, names in self.edited_keys([name for name in weights if name in self.target_indices]).items():
            own = {name: weights[name] for name in names}
            if combine is None:
                self._concatenate_factors(adapter_name, key, own)
                continue
            zero = torch.zeros_like(self.get_delta_weight(adapter_name, *key), dtype=torch.float32)
            deltas = [self._add_delta(zero, key, name, slice(None)) for name in own]
            self.set_delta_weight(adapter_name, *key, combine(deltas, zero.new_tensor(list(own.values()))))

    def _concatenate_factors(self, adapter_name: str, key: SliceKey, weights: Mapping[str, float]) -> None:
        """Set a low-rank delta to a weighted sum of others: `[B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2`."""
        factor_a, factor_b = self._stored_factors(adapter_name, key)  # (R, in), (out, R)
        factor_a.zero_(), factor_b.zero_()
        start = 0
        for name, weight in weights.items():
            other_a, other_b = self._stored_factors(name, key)
            columns = slice(start, start := start + len(other_a))
            factor_a[columns] = other_a
            factor_b[:, columns] = other_b * (weight * self.scaling[name] / self.scaling[adapter_name])

    @torch.no_grad()
    def set_delta_weight(self, adapter_name: str, projection: str, index: int, delta: Tensor) -> None:
        """Set an adapter's delta of one slice, scale included; a low-rank one to the nearest of its rank.

        Args:
            adapter_name: Name of the adapter.
            projection: Projection of the slice.
            index: Expert of the slice.
            delta: In the layout of :meth:`base_slice`.

        Raises:
            ValueError: The adapter's scale is 0, so that its delta is 0 whatever is stored.
        """
        if self.scaling[adapter_name] == 0:
            raise ValueError(
                f"adapter {adapter_name!r} has scale 0 and can have no other delta than 0; raise its strength"
            )
        # Decompositions exist in no lower precision.
        delta = delta.to(torch.promote_types(delta.dtype, torch.float32)) / self.scaling[adapter_name]
        if adapter_name in self.uoe_delta:
            position = self.target_indices[adapter_name].index(index)
            cast(nn.ParameterDict, self.uoe_delta[adapter_name])[projection][position] = delta
            return
        delta = delta.transpose(0, 1) if self.is_transposed(projection) else delta
        left, singular, right = torch.linalg.svd(delta, full_matrices=False)
        factor_a, factor_b = self._stored_factors(adapter_name, (projection, index))
        rank = min(len(factor_a), len(singular))
        root = singular[:rank].sqrt()
        factor_a.zero_(), factor_b.zero_()
        factor_a[:rank] = root[:, None] * right[:rank]
        factor_b[:, :rank] = left[:, :rank] * root

    def get_delta_weight(self, adapter_name: str, projection: str, index: int, *, rows: slice = slice(None)) -> Tensor:
        """An adapter's delta of one slice, or of some of its rows, scaled.

        Has the layout of :meth:`base_slice` and the dtype of the adapter.
        """
        scaling = self.scaling[adapter_name]
        if adapter_name in self.uoe_delta:
            position = self.target_indices[adapter_name].index(index)
            delta = cast(nn.ParameterDict, self.uoe_delta[adapter_name])[projection][position][rows]
            return delta if scaling == 1 else delta * scaling
        left, right = self._factors(adapter_name, (projection, index), rows)
        return (left @ right) * scaling

    def edited_slice(self, key: SliceKey, adapters: Sequence[str], *, rows: slice = slice(None)) -> Tensor:
        """A slice with the deltas of several adapters added in float32 and rounded once to the slice's dtype.

        The forward pass uses the rounded slice, so training sees exactly what a merge will write.

        Args:
            key: Which slice.
            adapters: Which deltas to add.
            rows: Compute these rows of the slice only.
        """
        base = self.original_slice(key)[rows]
        precise = torch.promote_types(base.dtype, torch.float32)
        total = base.to(precise)
        for adapter_name in adapters:
            total = self._add_delta(total, key, adapter_name, rows)
        return total.to(base.dtype)

    def _add_delta(self, total: Tensor, key: SliceKey, adapter_name: str, rows: slice) -> Tensor:
        if adapter_name in self.uoe_delta:
            return total + self.get_delta_weight(adapter_name, *key, rows=rows).to(total.dtype)
        left, right = (factor.to(total.dtype) for factor in self._factors(adapter_name, key, rows))
        return torch.addmm(total, left, right, alpha=self.scaling[adapter_name])  # the product is never stored

    def _factors(self, adapter_name: str, key: SliceKey, rows: slice) -> tuple[Tensor, Tensor]:
        """Factors of a low-rank delta, in the layout of the slice: shapes `(rows, R)` and `(R, columns)`."""
        factor_a, factor_b = self._stored_factors(adapter_name, key)
        if self.is_transposed(key[0]):
            return factor_a.transpose(0, 1)[rows], factor_b.transpose(0, 1)
        return factor_b[rows], factor_a

    def _stored_factors(self, adapter_name: str, key: SliceKey) -> tuple[Tensor, Tensor]:
        """Factors of a low-rank delta as they are stored: shapes `(R, in)` and `(out, R)`."""
        projection, position = key[0], self.target_indices[adapter_name].index(key[1])
        factor_a = cast(nn.ParameterDict, self.uoe_A[adapter_name])[projection][position]
        factor_b = cast(nn.ParameterDict, self.uoe_B[adapter_name])[projection][position]
        return factor_a, factor_b

    def edited_keys(self, adapters: Sequence[str]) -> dict[SliceKey, list[str]]:
        """Which slices the given adapters edit, and which of the adapters edit each."""
        keys: dict[SliceKey, list[str]] = {}
        for adapter_name in adapters:
            store = self.uoe_delta if adapter_name in self.uoe_delta else self.uoe_A
            if adapter_name not in store:
                continue
            for index in self.target_indices[adapter_name]:
                for projection in cast(nn.ParameterDict, store[adapter_name]):
                    keys.setdefault((projection, index), []).append(adapter_name)
        return keys

    def set_strength(self, adapter_name: str, strength: float) -> None:
        """Set the factor that an adapter's config has on all of its deltas; see :meth:`UOEModel.set_strength`."""
        self.strength[adapter_name] = strength
        self._update_scaling(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter, relative to its strength."""
        if adapter in self.scaling:
            self.relative_scale[adapter] = scale
            self._update_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters by `scale`."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.set_scale(adapter_name, self.relative_scale[adapter_name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters by `scale`; None: back to their strength."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.set_scale(adapter_name, 1.0 if scale is None else self.relative_scale[adapter_name] / scale)

    def _update_scaling(self, adapter_name: str) -> None:
        factors = (self.low_rank_scaling, self.strength, self.relative_scale)
        self.scaling[adapter_name] = math.prod(factor[adapter_name] for factor in factors)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for factors in (d[adapter_name] for d in (self.uoe_delta, self.uoe_A, self.uoe_B) if adapter_name in d):
            for projection, parameter in cast(nn.ParameterDict, factors).items():
                base = self.base_parameter(projection, self.target_indices[adapter_name][0])
                if parameter.is_meta or (device is None and base.is_meta):
                    continue
                # A quantised base has no dtype to train in.
                dtype = base.dtype if base.is_floating_point() else parameter.dtype
                parameter.data = parameter.data.to(device if device is not None else base.device, dtype)


def _stacks(num_slices: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    return {name: torch.zeros(num_slices, *shape) for name, shape in shapes.items()}
