"""Have parts of a model come into memory when they are called."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.moe.segments import find_layers
from uoe_peft.streaming.residence import PartKey, Residence

# Modules outside the layers that are larger than this are brought in when they are called, and dropped again.
_SMALL = 64 * 2**20


class Stop(Exception):
    """Ends a pass where the next layer would begin; never seen outside this room."""


def part_paths(model: PreTrainedModel) -> dict[PartKey, str]:
    """The parts of a model that are not always in memory: layers, embedding, LM head, and other large modules."""
    layers = find_layers(model)
    paths = {module: path for path, module in model.named_modules()}
    parts: dict[PartKey, str] = {int(name): paths[layer] for name, layer in layers.named_children()}
    inside = {module for layer in layers.children() for module in layer.modules()}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for module, path in paths.items():
        own = sum(p.numel() * p.dtype.itemsize for p in module.parameters(recurse=False))
        is_end = any(module is end for end in ends)
        if path and module not in inside and own and (own > _SMALL or is_end):
            parts[path] = path
    return parts


def lowest_edited_layer(model: PreTrainedModel) -> int | None:
    """The lowest layer that an adapter edits, 0 where it edits what comes before; None where there is no adapter."""
    # PEFT keeps what it wraps in `base_layer`.
    wrapped = {module for module in model.modules() if "base_layer" in module._modules}
    if not wrapped:
        return None
    inside = {int(name): wrapped & set(layer.modules()) for name, layer in find_layers(model).named_children()}
    is_elsewhere = len(wrapped) > sum(map(len, inside.values()))
    return 0 if is_elsewhere else min(layer_idx for layer_idx, own in inside.items() if own)


def load_when_called(model: PreTrainedModel, residence: Residence) -> None:
    """Bring layers and other parts in when they are called, and the small rest now.

    Args:
        model: Before any hook of somebody else.
        residence: Of its parts.
    """
    layers = find_layers(model)
    for key in residence.parts:
        if isinstance(key, int):
            layers.get_submodule(str(key)).register_forward_pre_hook(_bring_layer(residence, key))
        elif key:
            _bring_when_called(model.get_submodule(key), residence, key)
    residence.keep([""])


def _bring_layer(residence: Residence, layer_idx: int) -> Any:
    def bring(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if residence.ends_before == layer_idx:
            raise Stop
        residence.enter(layer_idx)

    return bring


def _bring_when_called(module: nn.Module, residence: Residence, key: PartKey) -> None:
    """Not a hook: those that are registered later may leave a pass without tokens here, and then nothing is needed."""
    forward = module.forward
    width = next(module.parameters()).shape[0]

    def bring_and_run(*args: Any, **kwargs: Any) -> Any:
        (first, *_) = (*args, *kwargs.values())
        if isinstance(first, Tensor) and first.is_floating_point() and not first.numel():
            # Logits of no token, in a graph that reaches what they would depend on.
            return first.sum(dim=-1, keepdim=True).expand(*first.shape[:-1], width)
        residence.enter(key)
        return forward(*args, **kwargs)

    module.forward = bring_and_run
