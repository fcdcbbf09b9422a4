"""Deltas of slices: their parameters, their scale, and merging them into the base weights and out again.

Letters: E experts of a layer, M of them edited by an adapter, N tokens routed to one expert, H hidden size, R rank.
A *slice* is what one expert contributes to a stacked parameter, or the router's whole matrix.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from uoe_peft.moe import is_quantised
from uoe_peft.tuner.config import UOEConfig

SliceKey = tuple[str, int]  # (projection, expert_idx)
_MERGE_BLOCK = 1 << 18  # elements of a slice that are merged at once


@dataclass(frozen=True)
class AppliedGroup:
    """Adapters whose deltas are added together, and the samples of the batch that they apply to (None: all)."""

    adapters: list[str]
    samples: list[bool] | None

    def mask(self, num_rows: int, device: torch.device) -> Tensor:
        """Whether each of `num_rows` rows, the same number for each sample in turn, belongs to such a sample."""
        samples = torch.tensor(self.samples, device=device)
        if num_rows % len(samples):
            raise ValueError(
                f"adapter_names has {len(samples)} entries, which does not divide the batch's {num_rows} tokens; "
                "pass one name for each sample"
            )
        return samples.repeat_interleave(num_rows // len(samples))


class UOELayer(nn.Module, BaseTunerLayer):
    """Deltas of single slices of one module, for any number of adapters.

    An adapter's delta of a projection is one parameter for all the experts that it edits here: `uoe_delta`, shape
    `(M, *slice)`, or the factors `uoe_A`, shape `(M, R, in)`, and `uoe_B`, shape `(M, out, R)`.
    """

    adapter_layer_names = ("uoe_delta", "uoe_A", "uoe_B")
    other_param_names = ("scaling", "initial_scaling", "target_indices")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.uoe_delta = nn.ModuleDict()
        self.uoe_A = nn.ModuleDict()
        self.uoe_B = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.target_indices: dict[str, list[int]] = {}
        self._aside: dict[SliceKey, Tensor] = {}  # slices as they were before a merge; kept, so that toggling is fast
        self._merged_keys: set[SliceKey] = set()
        self._active_adapter = adapter_name
        self.merged_adapters = []

    def __getattr__(self, name: str) -> Any:
        """Whatever the wrapper lacks is the wrapped module's: blocks read sizes and flags from what they call."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @abstractmethod
    def base_parameter(self, projection: str, index: int) -> Tensor:
        """The parameter that holds the slice."""

    @abstractmethod
    def base_slice(self, projection: str, index: int) -> Tensor:
        """The slice as it lies in memory: a view, so that writing to it edits the model."""

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
            delta_type: "full" or "low_rank"; "fixed" is a full delta that is no parameter, so that nothing trains it.
        """
        self.target_indices[adapter_name] = list(indices)
        low_rank_scale = config.uoe_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.initial_scaling[adapter_name] = low_rank_scale if delta_type == "low_rank" else 1.0
        self.scaling[adapter_name] = self.initial_scaling[adapter_name]
        if delta_type == "low_rank":
            sizes = {p: self._in_out(p, indices[0]) for p in projections}
            factors_a = _stacks(len(indices), {p: (config.r, size[0]) for p, size in sizes.items()})
            factors_b = _stacks(len(indices), {p: (size[1], config.r) for p, size in sizes.items()})
            self.uoe_A[adapter_name] = nn.ParameterDict(factors_a)
            self.uoe_B[adapter_name] = nn.ParameterDict(factors_b)
        else:
            deltas = _stacks(len(indices), {p: self.slice_shape(p, indices[0]) for p in projections})
            fixed = delta_type == "fixed"
            self.uoe_delta[adapter_name] = BufferDict(deltas, persistent=True) if fixed else nn.ParameterDict(deltas)
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
    def set_weighted_sum(self, adapter_name: str, weights: Mapping[str, float]) -> None:
        """Set an adapter's deltas to the weighted sum of other adapters' deltas.

        A low-rank delta is set to the nearest of its rank (truncated singular value decomposition).
        """
        for (projection, index), _ in self.edited_keys([adapter_name]).items():
            sources = self.edited_keys([name for name in weights if name in self.target_indices])
            total = torch.zeros_like(self.get_delta_weight(adapter_name, projection, index))
            for name in sources.get((projection, index), []):
                total = total + weights[name] * self.get_delta_weight(name, projection, index)
            self.set_delta_weight(adapter_name, projection, index, total)

    @torch.no_grad()
    def set_delta_weight(self, adapter_name: str, projection: str, index: int, delta: Tensor) -> None:
        """Set an adapter's delta of one slice, scale included; a low-rank one to the nearest of its rank.

        Args:
            adapter_name: Name of the adapter.
            projection: Projection of the slice.
            index: Expert of the slice.
            delta: In the layout of :meth:`base_slice`.
        """
        position = self.target_indices[adapter_name].index(index)
        delta = delta / self.scaling[adapter_name]
        if adapter_name in self.uoe_delta:
            cast(nn.ParameterDict, self.uoe_delta[adapter_name])[projection][position] = delta
            return
        delta = delta.transpose(0, 1) if self.is_transposed(projection) else delta
        left, singular, right = torch.linalg.svd(delta, full_matrices=False)
        factor_a = cast(nn.ParameterDict, self.uoe_A[adapter_name])[projection]
        rank = min(factor_a.shape[1], len(singular))
        root = singular[:rank].sqrt()
        factor_a[position, :rank] = root[:, None] * right[:rank]
        cast(nn.ParameterDict, self.uoe_B[adapter_name])[projection][position, :, :rank] = left[:, :rank] * root

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
        base = (self._aside[key] if key in self._merged_keys else self.base_slice(*key))[rows]
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
        projection, position = key[0], self.target_indices[adapter_name].index(key[1])
        factor_a = cast(nn.ParameterDict, self.uoe_A[adapter_name])[projection][position]  # (R, in)
        factor_b = cast(nn.ParameterDict, self.uoe_B[adapter_name])[projection][position]  # (out, R)
        if self.is_transposed(projection):
            return factor_a.transpose(0, 1)[rows], factor_b.transpose(0, 1)
        return factor_b[rows], factor_a

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

    def applied_groups(self, adapter_names: Sequence[str] | None) -> list[AppliedGroup]:
        """What this forward pass must add to which samples: nothing where adapters are disabled or merged.

        Args:
            adapter_names: In a mixed batch, the adapter of each sample ("__base__" for none); else None.

        Raises:
            ValueError: A mixed batch while adapters are merged.
        """
        if adapter_names is not None and self.merged:
            raise ValueError("cannot pass adapter_names while adapters are merged; call unmerge_adapter() first")
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        if adapter_names is None:
            return [AppliedGroup([name for name in self.active_adapters if name in self.target_indices], None)]
        distinct = [name for name in dict.fromkeys(adapter_names) if name in self.target_indices]
        return [AppliedGroup([name], [own == name for own in adapter_names]) for name in distinct]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the deltas into the base slices; the slices are kept aside, so that unmerging restores every bit.

        Args:
            safe_merge: Check the merged slices before any is written.
            adapter_names: Which adapters to merge; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
            RuntimeError: The base slices are sharded, offloaded or quantised, and cannot be written.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.target_indices]
        keys = self.edited_keys([*self.merged_adapters, *names])
        for key, adapters in keys.items():
            self._check_writable(key)
            if safe_merge and not torch.isfinite(self.edited_slice(key, adapters)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken"
                )
        for key, adapters in keys.items():
            self._set_aside(key)
            base = self.base_slice(*key)
            # Blocks of rows that stay in the cache: float32 copies of a whole expert would cost most of the time.
            step = max(1, _MERGE_BLOCK // base.shape[1])
            for start in range(0, base.shape[0], step):
                rows = slice(start, start + step)
                base[rows] = self.edited_slice(key, adapters, rows=rows)
        self.merged_adapters.extend(names)

    def _set_aside(self, key: SliceKey) -> None:
        if key in self._merged_keys:
            return
        base, buffer = self.base_slice(*key), self._aside.get(key)
        if buffer is not None and (buffer.dtype, buffer.device) == (base.dtype, base.device):
            buffer.copy_(base)  # fresh memory would cost more than the copy
        else:
            self._aside[key] = base.clone()
        self._merged_keys.add(key)

    def _check_writable(self, key: SliceKey) -> None:
        base = self.base_parameter(*key)
        reason = None
        if isinstance(base, DTensor):
            reason = "sharded over processes: gather the model first"
        elif base.is_meta:
            reason = "offloaded: load the model onto a device first"
        elif is_quantised(base):
            reason = f"quantised ({type(base).__name__}, {base.dtype}): load the model in bfloat16 or float32 first"
        if reason:
            raise RuntimeError(f"cannot merge into {key[0]} of {type(self.base_layer).__name__}: it is {reason}")

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the slices that :meth:`merge` kept aside, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for key in self._merged_keys:
            self.base_slice(*key).copy_(self._aside[key])
        self._merged_keys.clear()
        self.merged_adapters.clear()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scale of an adapter to its initial scale times `scale`."""
        if adapter in self.scaling:
            self.scaling[adapter] = self.initial_scaling[adapter] * scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters by `scale`."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.scaling[adapter_name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters by `scale`; None: back to the initial scale."""
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                initial = self.initial_scaling[adapter_name]
                self.scaling[adapter_name] = initial if scale is None else self.scaling[adapter_name] / scale

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
