"""UOE as a PEFT tuner: puts delta layers on target experts and on their routers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from uoe_peft.moe import ListedExperts, MoEBlock, find_moe_blocks
from uoe_peft.tuner.config import UOEConfig
from uoe_peft.tuner.layer import UOEExpertsLayer, UOELayer, UOESubstituteLayer


@dataclass(frozen=True)
class _Target:
    """What an adapter edits in one module."""

    block: MoEBlock
    projections: tuple[str, ...]
    indices: tuple[int, ...]
    delta_type: str
    matrices: dict[str, str] | None  # parameter paths, for modules that are called with substitutes

    def wrap(self, module: nn.Module, adapter_name: str) -> UOELayer:
        if self.matrices is not None:
            return UOESubstituteLayer(module, adapter_name, matrices=self.matrices)
        return UOEExpertsLayer(module, adapter_name, storage=self.block.storage)


class UOEModel(BaseTuner):
    """A Mixture-of-Experts model in which single experts, and the routers of their layers, have trainable deltas.

    Made by :func:`peft.get_peft_model` from a :class:`UOEConfig`. Method: https://arxiv.org/abs/2411.18797.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts block that this package can read.
        ValueError: A target layer, expert or projection does not exist; or an adapter was made for another model.
    """

    prefix = "uoe_"
    tuner_layer_cls = UOELayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: UOEConfig, model_config: dict[str, Any]) -> UOEConfig:
        return peft_config

    def _prepare_model(self, peft_config: UOEConfig, model: nn.Module) -> None:
        self._targets = _find_targets(peft_config, model)
        peft_config.target_modules = set(self._targets)

    def _check_target_module_exists(self, peft_config: UOEConfig, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: UOEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        spec = self._targets[current_key]
        layer = target if isinstance(target, UOELayer) else spec.wrap(target, adapter_name)
        layer.update_layer(
            adapter_name,
            peft_config,
            projections=spec.projections,
            indices=spec.indices,
            delta_type=spec.delta_type,
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The base class reads `child.weight`, which stacked experts lack; update_layer has placed the parameters.
        setattr(parent, child_name, new_module)


def _find_targets(config: UOEConfig, model: nn.Module) -> dict[str, _Target]:
    """What to edit, for each module path."""
    if config.target_experts == "auto":
        raise ValueError(
            'target_experts="auto" needs a forget set: pass the config to UnlearningTrainer, or call attribute_experts '
            "and use target_experts=attribution.top(1)"
        )
    blocks = {block.layer_idx: block for block in find_moe_blocks(model)}
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer_idx, expert_idx in config.target_experts:
        _check_pair(layer_idx, expert_idx, blocks, model)
        by_layer[layer_idx].append(expert_idx)
    targets: dict[str, _Target] = {}
    for layer_idx, experts in by_layer.items():
        targets |= _expert_targets(config, blocks[layer_idx], tuple(experts))
        if config.train_router:
            targets |= _router_target(config, blocks[layer_idx])
    _check_same_base(config, {str(layer_idx): blocks[layer_idx] for layer_idx in by_layer}, model)
    return targets


def _expert_targets(config: UOEConfig, block: MoEBlock, experts: tuple[int, ...]) -> dict[str, _Target]:
    storage = block.storage
    projections = tuple(config.target_projections or storage.projections)
    unknown = sorted(set(projections) - set(storage.projections))
    if unknown:
        raise ValueError(f"target_projections {unknown} not found in {block.experts_name}; it has {storage.projections}")
    if not isinstance(storage, ListedExperts):
        return {block.experts_name: _Target(block, projections, experts, config.delta_type, None)}
    matrices = {projection.replace(".", "_"): f"{projection}.weight" for projection in projections}
    shared = _Target(block, tuple(matrices), (), config.delta_type, matrices)
    return {
        f"{block.experts_name}.{storage.child_name(expert)}": replace(shared, indices=(expert,)) for expert in experts
    }


def _router_target(config: UOEConfig, block: MoEBlock) -> dict[str, _Target]:
    name = block.gate_name.removesuffix(".weight").replace(".", "_")
    return {block.router_name: _Target(block, (name,), (0,), config.router_delta_type, {name: block.gate_name})}


def _check_pair(layer_idx: int, expert_idx: int, blocks: dict[int, MoEBlock], model: nn.Module) -> None:
    name = type(model).__name__
    if layer_idx not in blocks:
        raise ValueError(
            f"layer {layer_idx} of {name} has no Mixture-of-Experts block; got target_experts with layer_idx={layer_idx}, "
            f"use one of {sorted(blocks)}"
        )
    num_experts = blocks[layer_idx].num_experts
    if expert_idx >= num_experts:
        raise ValueError(
            f"layer {layer_idx} of {name} has {num_experts} experts, got expert_idx={expert_idx}; "
            f"use 0 to {num_experts - 1}"
        )


def _check_same_base(config: UOEConfig, blocks: dict[str, MoEBlock], model: nn.Module) -> None:
    """Record what the target layers look like; or, for an adapter that was saved, compare with what it was made for."""
    found = {layer: _describe(block) for layer, block in blocks.items()}
    if config.base_experts is not None and config.base_experts != found:
        differing = sorted(layer for layer in found if config.base_experts.get(layer) != found[layer])
        raise ValueError(
            f"the adapter was made for another model: layer {differing[0]} of {type(model).__name__} has "
            f"{found[differing[0]]}, the adapter expects {config.base_experts.get(differing[0])}"
        )
    config.base_experts = found


def _describe(block: MoEBlock) -> dict[str, Any]:
    shapes = {name: list(block.storage.weight(name, 0).shape) for name in block.storage.projections}
    return {"num_experts": block.num_experts, "shapes": shapes}
