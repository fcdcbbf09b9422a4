"""Merging deltas into the base weights and out again, bit for bit, and what is left to apply meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from uoe_peft.moe import is_quantised
from uoe_peft.tuner.delta import DeltaLayer, SliceKey
from uoe_peft.tuner.mixed_batches import AppliedGroup

_MERGE_BLOCK = 1 << 18  # elements of a slice that are merged at once


class UOELayer(DeltaLayer):
    """Deltas of single slices of one module, which can be merged into it and out again."""

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self._aside: dict[SliceKey, Tensor] = {}  # slices as they were before a merge; kept, so that toggling is fast
        self._merged_keys: set[SliceKey] = set()

    def original_slice(self, key: SliceKey) -> Tensor:
        """The slice as it is without any adapter, merged or not."""
        return self._aside[key] if key in self._merged_keys else self.base_slice(*key)

    def applied_adapters(self) -> list[str]:
        """Adapters whose deltas a forward pass adds: none where adapters are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.target_indices]

    def applied_groups(self, adapter_names: Sequence[str] | None) -> list[AppliedGroup]:
        """What this forward pass must add to which samples.

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
            adapters = self.applied_adapters()
            return [AppliedGroup(adapters, None)] if adapters else []
        distinct = [name for name in dict.fromkeys(adapter_names) if name in self.target_indices]
        return [AppliedGroup([name], [own == name for own in adapter_names]) for name in distinct]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the deltas into the base slices; the slices are kept aside, so that unmerging restores every bit.

        Where anything fails half-way, the slices are as before.

        Args:
            safe_merge: Check the merged slices before any is written.
            adapter_names: Which adapters to merge; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
            RuntimeError: The base slices are sharded, offloaded or quantised, and cannot be written.
        """
        given = dict.fromkeys(check_adapters_to_merge(self, adapter_names))
        names = [name for name in given if name in self.target_indices]
        keys = self.edited_keys([*self.merged_adapters, *names])
        for key, adapters in keys.items():
            self._check_writable(key)
            if safe_merge and not torch.isfinite(self.edited_slice(key, adapters)).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(adapters)} seems to be broken"
                )
        try:
            for key, adapters in keys.items():
                self._set_aside(key)
                self._write(key, adapters)
        except BaseException:
            self._restore(self._merged_keys)
            still = self.edited_keys(self.merged_adapters)
            for key, adapters in still.items():
                self._write(key, adapters)
            self._merged_keys.intersection_update(still)
            raise
        self.merged_adapters.extend(names)

    def _write(self, key: SliceKey, adapters: Sequence[str]) -> None:
        base = self.base_slice(*key)
        # Blocks of rows that stay in the cache: float32 copies of a whole expert would cost most of the time.
        step = max(1, _MERGE_BLOCK // base.shape[1])
        for start in range(0, base.shape[0], step):
            rows = slice(start, start + step)
            base[rows] = self.edited_slice(key, adapters, rows=rows)

    def _restore(self, keys: Iterable[SliceKey]) -> None:
        for key in keys:
            self.base_slice(*key).copy_(self._aside[key])

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
            reason = (
                "sharded over processes: save the adapter, and merge it into a checkpoint (merge_checkpoint), or into "
                "the model in one process"
            )
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
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)  # the decorator is in between
            return
        self._restore(self._merged_keys)
        self._merged_keys.clear()
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrapper, for PEFT's unloading; :class:`UOEModel` has merged before, all or nothing."""
        return self.get_base_layer()
