"""The layer that UOE puts on a router."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from uoe_peft.moe import is_quantised, plain, substituted
from uoe_peft.tuner.merging import UOELayer
from uoe_peft.tuner.mixed_batches import AppliedGroup


class UOERouterLayer(UOELayer):
    """The delta of a router's matrix.

    A copy of the router that holds the edited matrix is called, so that its top-k, scaling, groups and biases stay as
    they are; so do its hooks. The router itself never changes: other threads may be reading it.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, gate_name: str) -> None:
        """Wrap a router.

        Args:
            base_layer: The router.
            adapter_name: Name of the first adapter.
            gate_name: Path of the matrix inside the router.
        """
        super().__init__(base_layer, adapter_name)
        self.gate_name = gate_name

    def base_parameter(self, projection: str, index: int) -> Tensor:
        """The router's matrix; there is one slice, whatever the index."""
        return self.get_base_layer().get_parameter(self.gate_name)

    def base_slice(self, projection: str, index: int) -> Tensor:
        """The router's matrix, dequantised where it can be."""
        return plain(self.base_parameter(projection, index))

    def slice_shape(self, projection: str, index: int) -> tuple[int, int]:
        """Rows and columns of the matrix, also where it is split until the router is called."""
        base = self.base_parameter(projection, index)
        rows, columns = (base if isinstance(base, DTensor) else self.base_slice(projection, index)).shape
        return rows, columns

    @property
    def weight(self) -> Tensor:
        """The edited matrix where it is the router's own: blocks may multiply with it themselves."""
        return cast(Tensor, self._read(self.get_base_layer(), "weight"))

    def _read(self, base_layer: nn.Module, name: str) -> Any:
        edited = self._edited_matrix(self.applied_adapters()) if name == self.gate_name.partition(".")[0] else None
        if edited is not None:
            return getattr(self._router(edited), name)
        return super()._read(base_layer, name)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the router returns when it is called with the edited matrix."""
        groups = self.applied_groups(adapter_names)
        if any(group.samples is not None for group in groups):
            return self._mixed_router(groups)(*args, **kwargs)
        edited = self._edited_matrix(groups[0].adapters) if groups else None
        if torch.compiler.is_compiling():  # copies cannot be traced; nor does a trace touch the module
            substitute = {} if edited is None else {self.gate_name: edited}
            return torch.func.functional_call(self.get_base_layer(), substitute, args, kwargs)
        return self._router(edited)(*args, **kwargs)

    def _edited_matrix(self, adapters: Sequence[str]) -> Tensor | None:
        """The matrix with the adapters' deltas; None where they have none. A router has one slice."""
        keys = self.edited_keys(adapters)
        return next((self.edited_slice(key, names) for key, names in keys.items()), None)

    def _router(self, matrix: Tensor | None) -> nn.Module:
        """A router that multiplies with another matrix than its own, or (None) with its own."""
        router = self.get_base_layer()
        if matrix is None:
            own = self.base_parameter("", 0)
            if own.requires_grad or is_quantised(own):
                return router
            # Some routers cast their matrix when they are called: then not the one that later calls round to.
            matrix = own.detach()
        return substituted(router, self.gate_name, matrix)

    def _mixed_router(self, groups: Sequence[AppliedGroup]) -> nn.Module:
        """A router that gives every sample what its own adapter's router says.

        Hooks run once, as in any other call, and see what the block gets: transformers collects router logits so.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = self._router(None).forward(*args, **kwargs)
            for group in groups:
                edited = self._edited_matrix(group.adapters)
                outputs = _select(group, self._router(edited).forward(*args, **kwargs), outputs)
            return outputs

        mixed = copy(self.get_base_layer())
        mixed._compiled_call_impl = None
        mixed.forward = forward
        return mixed


def _select(group: AppliedGroup, edited: Any, outputs: Any) -> Any:
    """A router's outputs with the rows of a group's samples taken from the edited router's."""
    if isinstance(outputs, tuple):
        return tuple(_select(group, e, o) for e, o in zip(edited, outputs, strict=True))
    if not isinstance(outputs, Tensor) or outputs.dim() == 0:
        return outputs  # nothing, or an auxiliary loss of the batch
    flat = outputs.reshape(-1, outputs.shape[-1] if outputs.dim() > 1 else 1)
    mask = group.mask(flat.shape[0], flat.device).unsqueeze(-1)
    return torch.where(mask, edited.reshape(flat.shape), flat).view_as(outputs)
