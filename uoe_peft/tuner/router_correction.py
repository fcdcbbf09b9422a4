"""Deltas of routers above the edited layers: computed after training, then part of the adapter like any other."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from uoe_peft.moe import MoEBlock, find_moe_blocks
from uoe_peft.tuner.config import UOEConfig
from uoe_peft.tuner.delta import UOELayer
from uoe_peft.tuner.model import UOEModel, correction_target


def correctable_blocks(model: UOEModel, adapter_name: str) -> list[MoEBlock]:
    """Blocks whose router an adapter may correct, in ascending order.

    Those above its lowest target layer (below it, routers see what they see without the adapter) whose router it does
    not train. Paths are inside `model.model`.
    """
    config = _config(model, adapter_name)
    targets = {layer_idx for layer_idx, _ in config.target_experts}
    trained = targets if config.train_router else set()
    blocks = find_moe_blocks(model.model)
    return [block for block in blocks if block.layer_idx > min(targets) and block.layer_idx not in trained]


def add_router_correction(model: UOEModel, adapter_name: str, layer_idx: int, delta: Tensor) -> None:
    """Give an adapter a fixed delta of the router of a further layer.

    It is saved, merged and switched with the adapter; being no parameter, it is never trained.

    Args:
        model: The model that has the adapter, unmerged.
        adapter_name: Name of the adapter.
        layer_idx: Decoder layer whose router the adapter neither trains nor corrects yet.
        delta: To be added to the router's matrix, and of its shape.

    Raises:
        ValueError: There is no such layer, the adapter has a delta of its router, or `delta` has another shape.
    """
    config = _config(model, adapter_name)
    corrected = config.corrected_router_layers or []
    if layer_idx in corrected:
        raise ValueError(f"adapter {adapter_name!r} has a correction of layer {layer_idx} already; remove that first")
    blocks = {block.layer_idx: block for block in find_moe_blocks(model.model)}
    ((path, target),) = correction_target(config, layer_idx, blocks, model.model).items()
    router = model.model.get_submodule(path)
    layer = router if isinstance(router, UOELayer) else target.wrap(router, adapter_name)
    place = (target.projections[0], target.indices[0])  # a router has one slice
    if delta.shape != layer.slice_shape(*place):
        raise ValueError(
            f"delta must have the shape {layer.slice_shape(*place)} of the router's matrix in layer {layer_idx}, got "
            f"{tuple(delta.shape)}"
        )
    layer.update_layer(
        adapter_name, config, projections=target.projections, indices=target.indices, delta_type=target.delta_type
    )
    layer.set_delta_weight(adapter_name, *place, delta)
    layer.set_adapter(model.active_adapters, inference_mode=config.inference_mode)
    model.model.set_submodule(path, layer)
    config.corrected_router_layers = sorted([*corrected, layer_idx])
    config.target_modules = {*(config.target_modules or ()), path}


def remove_router_correction(model: UOEModel, adapter_name: str, layer_idx: int) -> None:
    """Take away the delta that `add_router_correction` gave to an adapter, which must not be merged.

    Raises:
        ValueError: There is no such delta.
    """
    config = _config(model, adapter_name)
    corrected = config.corrected_router_layers or []
    if layer_idx not in corrected:
        raise ValueError(f"adapter {adapter_name!r} corrects the routers of layers {corrected}, got {layer_idx}")
    (path,) = (block.router_name for block in find_moe_blocks(model.model) if block.layer_idx == layer_idx)
    layer = cast(UOELayer, model.model.get_submodule(path))
    layer.set_adapter([])  # else PEFT makes another adapter active in the place of the one that goes
    layer.delete_adapter(adapter_name)
    layer.set_adapter(model.active_adapters, inference_mode=config.inference_mode)
    if not layer.target_indices:
        model.model.set_submodule(path, layer.base_layer)
    config.corrected_router_layers = [index for index in corrected if index != layer_idx] or None
    config.target_modules = set(config.target_modules or ()) - {path}


def _config(model: UOEModel, adapter_name: str) -> UOEConfig:
    return cast(UOEConfig, model.peft_config[adapter_name])
