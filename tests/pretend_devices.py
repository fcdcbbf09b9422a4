"""Several devices on a machine that has one: tensors know where they pretend to be, and may not meet others.

Every storage has a place, a number: that of `torch.device("cpu", place)`, which PyTorch takes for the plain CPU. Moving
between places copies, as it does between accelerators; an operation on tensors of two places is an error, as it is
there. Only forward passes are watched: in the backward pass autograd places gradients by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Places = dict[int, tuple[int, Any]]
"""By address of a storage: its place, and the storage, which must live on so that no other gets its address."""

_MAY_MEET = ("_to_copy", "copy_", "set_")


def device(place: int) -> torch.device:
    return torch.device("cpu", place)


class _Watch(TorchDispatchMode):
    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def place(self, tensor: Tensor) -> int | None:
        return self.places.get(tensor.untyped_storage()._cdata, (None,))[0]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        found = {place for tensor in given if (place := self.place(tensor)) is not None}
        name = op.__name__.split(".")[0]
        if torch._C._current_graph_task_id() != -1:  # the backward pass
            return op(*args, **kwargs)
        if len(found) > 1 and name not in _MAY_MEET:
            raise RuntimeError(f"{op}: tensors on the places {sorted(found)} meet")
        output = op(*args, **kwargs)
        asked = kwargs.get("device")
        place = asked.index if asked is not None else next(iter(found), None)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and place is not None and self.place(tensor) is None:
                storage = tensor.untyped_storage()
                self.places[storage._cdata] = (place, storage)
        return output


class _Move(TorchFunctionMode):
    """`tensor.to(other)` asks the other's real device, and `tensor.cpu()` changes nothing on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            return args[0].to(device=args[1].device, dtype=args[1].dtype)
        if function is torch.tensor and isinstance(kwargs.get("device"), torch.device):
            return torch.tensor(*args, **kwargs | {"device": None}).to(kwargs["device"])  # no operation tells of it
        if function is Tensor.cpu and args[0].device.index is not None:
            return torch.tensor(args[0].tolist(), dtype=args[0].dtype).view(args[0].shape)
        return function(*args, **kwargs)


@contextmanager
def pretend_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the context `torch.device("cpu", 0)`, `("cpu", 1)`, … are devices of their own."""
    watch, real = _Watch({}), torch.Tensor.device

    def pretended(tensor: Tensor) -> torch.device:
        with torch._C.DisableTorchFunction():
            place = watch.place(tensor) if tensor.layout is torch.strided else None
            return real.__get__(tensor) if place is None else device(place)

    with monkeypatch.context() as patch, watch, _Move():
        patch.setattr(torch.Tensor, "device", property(pretended))
        yield


def spread(model: nn.Module, last: int) -> dict[str, int]:
    """Put the decoder layers up to one on place 0, those above it and the LM head on place 1, as `device_map` does."""
    inner, placed = model.model, {}
    for name, module in [("embed_tokens", inner.embed_tokens), ("rotary_emb", inner.rotary_emb)]:
        placed[f"model.{name}"] = _put(module, 0)
    for index, layer in enumerate(inner.layers):
        placed[f"model.layers.{index}"] = _put(layer, int(index > last))
    placed["model.norm"], placed["lm_head"] = _put(inner.norm, 1), _put(model.lm_head, 1)
    add_hook_to_module(model, AlignDevicesHook(execution_device=device(0), io_same_device=True), append=True)
    model.hf_device_map = placed
    return placed


def _put(module: nn.Module, place: int) -> int:
    for child in module.modules():
        tensors = [*child._parameters.items(), *child._buffers.items()]
        for name, tensor in tensors:
            if tensor is not None:
                moved = tensor.detach().to(device(place))
                is_parameter = name in child._parameters
                setattr(child, name, nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved)
        # The block is aligned where it is entered, its parts where they are.
    add_hook_to_module(module, AlignDevicesHook(execution_device=device(place)))
    return place
