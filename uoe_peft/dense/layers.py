"""Find the dense feed-forward layers of a decoder: a gate, an up and a down projection, whatever the family."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, cast

from torch import nn
from torch.distributed.tensor import DTensor

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks, is_quantised

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.[^.]+$")  # the layer itself holds the module: model.layers.3.mlp


def find_dense_layers(model: nn.Module) -> dict[int, str]:
    """Path of the feed-forward module of each decoder layer, by the layer's index.

    Args:
        model: A dense causal language model.

    Raises:
        UnsupportedModelError: The model has routed experts already, an adapter, or a feed-forward module that is not
            made of linear layers called gate_proj, up_proj and down_proj; or its layers share one; or its weights are
            quantised, or not in memory.
    """
    _check_is_dense(model)
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((f"{name}." if name else "" for name, module in model.named_modules() if module is decoder), "")
    inside = {name: m for name, m in model.named_modules(remove_duplicate=False) if name.startswith(prefix)}
    found = {name: module for name, module in inside.items() if set(PROJECTIONS) <= module._modules.keys()}
    if not found:
        raise UnsupportedModelError(_nothing_found(model, inside))
    by_layer: dict[int, str] = {}
    for name, module in found.items():
        match = _LAYER.search(name)
        if match is None or int(match[1]) in by_layer:
            raise UnsupportedModelError(
                f"{name} of {type(model).__name__} is not the one feed-forward module of a decoder layer; expected "
                "paths such as model.layers.3.mlp, one for each layer"
            )
        _check_module(name, module)
        by_layer[int(match[1])] = name
    _check_not_shared(model, found)
    return dict(sorted(by_layer.items()))


def num_neurons(model: nn.Module) -> dict[int, int]:
    """I, the number of neurons, of each decoder layer. Raises as :func:`find_dense_layers`."""
    layers = find_dense_layers(model)
    return {i: cast(nn.Linear, model.get_submodule(f"{path}.gate_proj")).out_features for i, path in layers.items()}


def _check_is_dense(model: nn.Module) -> None:
    name = type(model).__name__
    if any("base_layer" in module._modules for module in model.modules()):
        raise UnsupportedModelError(f"{name} has an adapter; factorize the base model, then add adapters")
    try:
        blocks = find_moe_blocks(model)
    except UnsupportedModelError:
        return
    raise UnsupportedModelError(
        f"{name} has experts already, {blocks[0].num_experts} in layer {blocks[0].layer_idx}: UOE edits these; only "
        "dense models are factorized"
    )


def _check_module(name: str, module: nn.Module) -> None:
    further = sorted(module._modules.keys() - {*PROJECTIONS, "act_fn"})
    others = {p: type(module._modules[p]).__name__ for p in PROJECTIONS if type(module._modules[p]) is not nn.Linear}
    reason = None
    if further or others or module._parameters or not hasattr(module, "act_fn"):
        what = further or others or sorted(module._parameters) or "no act_fn"
        reason = f"is a {type(module).__name__} with {what}; expected three nn.Linear modules and act_fn, nothing else"
    elif any(is_quantised(p) for p in module.parameters()):
        reason = "is quantised; load the model in bfloat16 or float32"
    elif any(isinstance(p, DTensor) for p in module.parameters()):
        reason = "is split over processes; factorize the model in each of them before it is sharded"
    elif any(p.is_meta for p in module.parameters()) and any(hasattr(part, "_hf_hook") for part in module.modules()):
        reason = "is offloaded; load the model with a device_map that keeps it on a device"
    if reason:
        raise UnsupportedModelError(f"cannot factorize {name}: it {reason}")


def _check_not_shared(model: nn.Module, found: dict[str, nn.Module]) -> None:
    owned = Counter(id(p) for module in found.values() for p in module.parameters())
    shared = [name for name, module in found.items() if any(owned[id(p)] > 1 for p in module.parameters())]
    if shared:
        raise UnsupportedModelError(
            f"{type(model).__name__} has the same feed-forward weights in {', '.join(shared[:3])}: an edit of a group "
            "would be one of all of them"
        )


def _nothing_found(model: nn.Module, inside: dict[str, nn.Module]) -> str:
    named = [name for name in inside if name.rpartition(".")[2] in ("mlp", "feed_forward", "ffn")]
    has = ""
    if named:
        module = inside[named[0]]
        has = f": {named[0]} is a {type(module).__name__} with {sorted(module._modules)}"
    return (
        f"{type(model).__name__} has no feed-forward module with {', '.join(PROJECTIONS)}{has}; models such as Llama, "
        "Mistral, Qwen2, Qwen3, SmolLM2 and Gemma can be factorized"
    )
