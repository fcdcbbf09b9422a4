"""Names of stores, which change with whatever the states in them depend on: a stale one is never found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn


def store_key(*parts: object) -> str:
    """A name of 32 characters that changes with any of its parts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def weights_key(model: nn.Module, weights: Iterable[Tensor], *, context: Callable[[], Any]) -> str:
    """What a model computes with these weights depends on: their values, its configuration, and versions.

    Reads every weight, at about the speed of the disk.

    Args:
        model: The model.
        weights: Those of its parameters and buffers that matter.
        context: Makes the context of its forward passes, such as autocast.
    """
    key = hashlib.sha256()
    with context():
        devices = sorted({"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"})
        autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    config = cast(Any, model).config
    for part in (
        torch.__version__,
        transformers.__version__,
        autocast,
        config.to_json_string(use_diff=False),
        getattr(config, "_commit_hash", None),
        getattr(config, "_attn_implementation", None),
        getattr(config, "_experts_implementation", None),
    ):
        key.update(f"{part}\n".encode())
    for tensor in weights:
        key.update(f"{tensor.device.type} {tensor.dtype} {tuple(tensor.shape)}".encode())
        key.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return key.hexdigest()


def all_weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def base_weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a model but for those of its adapters."""
    adapters = {
        id(tensor)
        for layer in model.modules()
        # PEFT's layers name the attributes that hold their adapters. What is not named there changes the key: at worst
        # a store is not found.
        for name in getattr(layer, "adapter_layer_names", ())
        if isinstance(part := getattr(layer, name, None), nn.Module)
        for tensor in all_weights(part)
    }
    return (tensor for tensor in all_weights(model) if id(tensor) not in adapters)
