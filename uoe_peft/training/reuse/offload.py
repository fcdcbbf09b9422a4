"""Layers whose weights leave their device while training starts above them.

The tensors stay where they are in the model and keep their values; only their storage moves. So whatever reads weights,
such as saving, sees what it always does, and only running the layers has to wait.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uoe_peft.data import Batch
from uoe_peft.moe.segments import find_layers
from uoe_peft.training.reuse.prefix_cache import PrefixCache
from uoe_peft.training.reuse.store import check_room, map_file, raw_bytes

logger = logging.getLogger(__name__)


class LayersAway(RuntimeError):
    """A layer was called while its weights were off the device."""


def check_can_leave(model: nn.Module) -> None:
    """Refuse models whose layers cannot be moved as plain tensors.

    Raises:
        ValueError: The weights are quantised, or spread over devices.
    """
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    quantized = bool(getattr(model, "is_quantized", False))
    if quantized or len(devices) > 1:
        found = "quantised weights" if quantized else f"weights spread over {sorted(devices)}"
        raise ValueError(
            f"offload_prefix=True moves plain weights from one device, and the model has {found}; load it otherwise, "
            "or pass offload_prefix=False"
        )


@contextmanager
def layers_away(model: nn.Module, layer_idx: int, *, directory: str | None = None) -> Iterator[None]:
    """Inside the context the layers below a decoder layer take no memory on their device.

    On an accelerator their weights go to the CPU, and calling one of the layers is an error. On the CPU they are mapped
    from a file instead: the system may drop them from memory, and reads them again should they be used.

    Args:
        model: Any model with routed experts; nothing below the layer is trained.
        layer_idx: Decoder layer, 1 or higher.
        directory: Where the file is; None: in a temporary folder.

    Raises:
        PrefixCacheUnavailable: The disk has no room.
    """
    tensors = [tensor for tensor in weights_below(model, layer_idx) if tensor.numel()]
    size = sum(tensor.nbytes for tensor in tensors)
    device = next(iter(find_layers(model).parameters())).device
    with ExitStack() as stack:
        stack.callback(_release, device)
        if _is_in_main_memory(device):
            move = stack.enter_context(_to_files(directory, size))
        else:
            move = Tensor.cpu
            stack.enter_context(_refuse_calls(model, layer_idx))
        for tensor in tensors:
            form = torch.empty_like(tensor, device="meta", requires_grad=False)
            stack.callback(_put_back, tensor, form, tensor.device)
            tensor.data = move(tensor.data)
        _release(device)
        logger.info("%.1f MB of weights below decoder layer %d have left the %s", size / 1e6, layer_idx, device.type)
        yield


@contextmanager
def naming_rows(cache: PrefixCache, batches: Mapping[str, Batch], decode: Callable[..., Any]) -> Iterator[None]:
    """Inside the context the error of a layer that is away says, too, which sequences of a step called it.

    Args:
        cache: What it ought to start from.
        batches: Those of the step, by role.
        decode: Makes text of token ids.

    Raises:
        LayersAway: As before, with the beginning of each row that is not in the cache.
    """
    try:
        yield
    except LayersAway as error:
        missing = [
            f"{role} {decode(batch['input_ids'][row][:24], skip_special_tokens=True)!r}"
            for role, batch in batches.items()
            for row in cache.missing(batch)
        ]
        if not missing:
            raise
        raise LayersAway(
            f"{error}. Not in the prefix cache: {', '.join(missing)}. It has the rows of training and those that "
            "eval_strategy evaluates; evaluate others after training, or pass offload_prefix=False"
        ) from error


def weights_below(model: nn.Module, layer_idx: int) -> list[Tensor]:
    """Parameters and buffers that only the layers below a decoder layer have; some families share parts of layers."""
    layers = find_layers(model)
    stacks = [name for name, module in model.named_modules(remove_duplicate=False) if module is layers]
    below = tuple(f"{stack}.{index}." for stack in stacks for index in range(layer_idx))
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    elsewhere = {id(tensor) for name, tensor in named if not name.startswith(below)}
    return list({id(t): t for name, t in named if name.startswith(below) and id(t) not in elsewhere}.values())


@contextmanager
def _to_files(directory: str | None, size: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function that copies a tensor to a file and returns it mapped from there."""
    with tempfile.TemporaryDirectory(prefix="uoe-offload-", dir=directory, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        check_room(folder, size, what="offload_prefix=True")

        numbers = count()

        def move(tensor: Tensor) -> Tensor:
            path = folder / f"{next(numbers)}.weights"
            path.write_bytes(raw_bytes(tensor))
            return map_file(path, tensor.dtype, tensor.shape)

        yield move


@contextmanager
def _refuse_calls(model: nn.Module, layer_idx: int) -> Iterator[None]:
    layers = find_layers(model)

    def refuse(layer: nn.Module, args: tuple[Any, ...]) -> None:
        raise LayersAway(
            f"a layer below decoder layer {layer_idx} was called, whose weights have left the device until training "
            "ends (offload_prefix=True)"
        )

    handles = [layers.get_submodule(str(index)).register_forward_pre_hook(refuse) for index in range(layer_idx)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _put_back(tensor: Tensor, form: Tensor, device: torch.device) -> None:
    tensor.data = torch.empty_like(form, device=device).copy_(tensor.data)


def _is_in_main_memory(device: torch.device) -> bool:
    return device.type == "cpu"


def _release(device: torch.device) -> None:
    if not _is_in_main_memory(device):
        torch.get_device_module(device).empty_cache()
