"""Names of stores, which change with whatever the states in them depend on: a stale one is never found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn


def store_key(*parts: object) -> str:
    """A name of 32 characters that changes with any of its parts."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def weights_key(model: nn.Module, weights: Iterable[Tensor], *described: str, context: Callable[[], Any]) -> str:
    """What a model computes with these weights depends on: their values, its configuration, and versions.

    Reads every weight, at about the speed of the disk.

    Args:
        model: The model.
        weights: Those of its parameters and buffers that matter.
        *described: What else matters.
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
        *described,
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


def reference_weights(model: nn.Module, adapters: Collection[str] = ()) -> tuple[str, Iterator[Tensor]]:
    """What the answers of a model depend on where only some of its adapters are on: none for its base.

    Args:
        model: The model.
        adapters: Names of the adapters that are on.

    Returns:
        What these adapters are, as text; and all parameters and buffers but those of the other adapters.
    """
    off = {
        id(tensor)
        for layer in model.modules()
        # PEFT's layers name the attributes that hold their adapters. What is not named there changes the key: at worst
        # a store is not found.
        for attribute in getattr(layer, "adapter_layer_names", ())
        for name, part in _by_adapter(getattr(layer, attribute, None))
        if name not in adapters
        for tensor in ([part] if isinstance(part, Tensor) else all_weights(part))
    }
    described = [
        (name, cast(Any, model).peft_config[name].to_dict(), _scales(model, name)) for name in sorted(adapters)
    ]
    weights = (tensor for tensor in all_weights(model) if id(tensor) not in off)
    return json.dumps(described, sort_keys=True, default=_plain), weights


def _by_adapter(part: object) -> list[tuple[str, Any]]:
    return list(cast(Any, part).items()) if isinstance(part, nn.Module) and hasattr(part, "items") else []


def _scales(model: nn.Module, adapter: str) -> list[Any]:
    """The scale of an adapter in each layer, which its config does not tell once it was changed."""
    scales = (getattr(layer, "scaling", None) for layer in model.modules() if hasattr(layer, "adapter_layer_names"))
    return [scale.get(adapter) for scale in scales if isinstance(scale, dict)]


def _plain(value: object) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
