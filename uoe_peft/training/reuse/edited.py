"""Which decoder layers training can change: everything below the lowest of them is computed once."""

from __future__ import annotations

from torch import nn

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.segments import find_layers
from uoe_peft.training.reuse.store import NothingToCache


def lowest_edited_layer(model: nn.Module) -> int:
    """The lowest decoder layer that has an adapter or a trainable parameter.

    Raises:
        NothingToCache: It is the first layer; there is none; or something beside the layers is trained.
    """
    try:
        layers = find_layers(model)
    except UnsupportedModelError as error:
        raise NothingToCache(str(error)) from error
    outside = trained_beside(model, layers)
    if outside:
        raise NothingToCache(f"{outside[0]} is trained, which is not in a decoder layer")
    edited = edited_layers(layers)
    if not edited or min(edited) == 0:
        raise NothingToCache(
            f"there must be layers that are not edited below those that are; edited are {edited} of "
            f"{len(list(layers.children()))} decoder layers"
        )
    return min(edited)


def edited_layers(layers: nn.Module) -> list[int]:
    """Indices of the decoder layers that have an adapter or a trainable parameter."""
    return [int(name) for name, layer in layers.named_children() if _is_edited(layer)]


def trained_beside(model: nn.Module, layers: nn.Module) -> list[str]:
    """Names of the trainable parameters that are not in decoder layers."""
    inside = {id(parameter) for parameter in layers.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]


def _is_edited(layer: nn.Module) -> bool:
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return trained or any("base_layer" in module._modules for module in layer.modules())
