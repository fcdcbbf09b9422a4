"""Which modules an adapter edits, and whether they can be edited."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import ListedExperts, MoEBlock, find_moe_blocks, unwrap
from uoe_peft.moe.experts import StackedExperts
from uoe_peft.tuner.config import UOEConfig
from uoe_peft.tuner.layer import UOEExpertsLayer, UOELinearLayer
from uoe_peft.tuner.merging import UOELayer
from uoe_peft.tuner.router import UOERouterLayer


@dataclass(frozen=True)
class Target:
    """What an adapter edits in one module."""

    block: MoEBlock
    kind: Literal["experts", "linear", "router"]
    projections: tuple[str, ...]
    indices: tuple[int, ...]
    delta_type: str
    writes_output: bool = False  # of a linear module: whether its output is the expert's

    def wrap(self, module: nn.Module, adapter_name: str) -> UOELayer:
        """The layer that holds deltas of the module."""
        match self.kind:
            case "experts":
                return UOEExpertsLayer(module, adapter_name)
            case "linear":
                return UOELinearLayer(module, adapter_name, writes_output=self.writes_output)
            case "router":
                return UOERouterLayer(module, adapter_name, gate_name=cast(str, self.block.gate_name))


def find_targets(config: UOEConfig, model: nn.Module) -> dict[str, Target]:
    """What an adapter edits, for each module path.

    Warns:
        UserWarning: The target layers have no routing to train, and `train_router` is turned off.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts block that this package can read, or a target's
            weights are not in memory, or split over processes in a way that cannot be brought together.
        ValueError: A target layer, expert or projection does not exist; or the adapter was made for another model.
    """
    if config.target_experts == "auto":
        raise ValueError(
            'target_experts="auto" needs a forget set: pass the config to UnlearningTrainer, or call '
            "attribute_experts and use target_experts=attribution.top(1)"
        )
    _check_engine(model)
    blocks = {block.layer_idx: block for block in find_moe_blocks(model)}
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer_idx, expert_idx in config.target_experts:
        _check_pair(layer_idx, expert_idx, blocks, model)
        by_layer[layer_idx].append(expert_idx)
    _settle_router(config, [blocks[layer_idx] for layer_idx in by_layer])
    targets: dict[str, Target] = {}
    for layer_idx, experts in by_layer.items():
        targets |= _expert_targets(config, blocks[layer_idx], tuple(experts))
        if config.train_router:
            targets |= _router_target(blocks[layer_idx], config.router_delta_type)
    _check_same_base(config, {str(layer_idx): blocks[layer_idx] for layer_idx in by_layer}, model)
    for path, target in targets.items():
        _check_in_memory(path, target, model)
    return targets


def _expert_targets(config: UOEConfig, block: MoEBlock, experts: tuple[int, ...]) -> dict[str, Target]:
    storage = block.storage
    projections = tuple(config.target_projections or storage.projections)
    unknown = sorted(set(projections) - set(storage.projections))
    if unknown:
        raise ValueError(f"{block.experts_name} has no target_projections {unknown}; it has {storage.projections}")
    if config.init_weights == "zero_expert":
        _check_can_be_silenced(block, projections)
    if not isinstance(storage, ListedExperts):
        return {block.experts_name: Target(block, "experts", projections, experts, config.delta_type)}
    targets = {}
    for projection, expert_idx in product(projections, experts):
        last = projection == storage.projections[-1]
        path = f"{block.experts_name}.{storage.linear_name(projection, expert_idx)}"
        targets[path] = Target(block, "linear", ("weight",), (expert_idx,), config.delta_type, writes_output=last)
    return targets


def _settle_router(config: UOEConfig, blocks: Sequence[MoEBlock]) -> None:
    """Turn `train_router` off where no router decides anything, and say so: the saved adapter must say it, too."""
    layers = [block.layer_idx for block in blocks if block.gate_name is None]
    if config.train_router and layers:
        warnings.warn(
            f"train_router is turned off: in the layers {layers} every token uses all experts with weight 1, so that "
            "there is no routing to train; set train_router=False",
            stacklevel=2,
        )
        config.train_router = False


def _router_target(block: MoEBlock, delta_type: str) -> dict[str, Target]:
    assert block.gate_name is not None
    name = block.gate_name.removesuffix(".weight").replace(".", "_")
    return {block.router_name: Target(block, "router", (name,), (0,), delta_type)}


def _check_pair(layer_idx: int, expert_idx: int, blocks: dict[int, MoEBlock], model: nn.Module) -> None:
    if layer_idx not in blocks:
        raise ValueError(
            f"layer {layer_idx} of {type(model).__name__} has no Mixture-of-Experts block, got layer_idx={layer_idx} "
            f"in target_experts; use one of {sorted(blocks)}"
        )
    num_experts = blocks[layer_idx].num_experts
    if expert_idx >= num_experts:
        raise ValueError(
            f"layer {layer_idx} of {type(model).__name__} has {num_experts} experts, got expert_idx={expert_idx}; "
            f"use 0 to {num_experts - 1}"
        )


def _check_can_be_silenced(block: MoEBlock, projections: tuple[str, ...]) -> None:
    last = block.storage.projections[-1]
    if last not in projections:
        raise ValueError(f'init_weights="zero_expert" needs {last!r} among target_projections')
    if block.storage.has_output_bias:
        raise ValueError(
            f'init_weights="zero_expert" cannot silence the experts of {block.experts_name}: they have biases, which a '
            "delta of their matrices does not reach; use uoe_peft.moe.interventions.silence_expert"
        )


def _check_in_memory(path: str, target: Target, model: nn.Module) -> None:
    """The weights to edit must be in this process, on a device; or in parts that can be brought together."""
    module, names = unwrap(model.get_submodule(path)), path.split(".")
    parents = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
    hooks = [getattr(owner, "_hf_hook", None) for owner in (*parents, *module.modules())]
    reason = None
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        reason = "partitioned by DeepSpeed ZeRO-3, which no edit of single experts can read: use FSDP version 2"
    elif any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        reason = _why_not_sharded(target, module, model)
    elif any(p.is_meta for p in module.parameters()) and any(_offloads(hook) for hook in hooks):
        reason = "offloaded to the CPU or disk: load the model with a device_map that keeps this layer on a device"
    if reason:
        raise UnsupportedModelError(f"cannot edit {path} of {type(model).__name__}: its weights are {reason}")


def _why_not_sharded(target: Target, module: nn.Module, model: nn.Module) -> str | None:
    """Why weights that are sharded already cannot be edited; None where an adapter, which each process has, can be."""
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return (
            "sharded over processes: add the adapter before fully_shard (the Trainer's FSDP version 2 does), or load "
            "the model with distributed_config=DistributedConfig(...), whose adapters the Trainer keeps equal"
        )
    axes = {axis for p in module.parameters() if isinstance(p, DTensor) for axis in p.device_mesh.mesh_dim_names or ()}
    held_by_layer = axes <= {"fsdp", "dp_replicate"} and not isinstance(module, FSDPModule)
    if target.kind == "router" and not held_by_layer:
        return "split by a plan of their own: take the router out of tp_plan and fsdp_plan, or set train_router=False"
    if target.kind == "linear" or not isinstance(target.block.storage, StackedExperts):
        return "sharded over processes and not stacked: add the adapter before they are sharded (FSDP version 2)"
    if target.kind == "experts" and not held_by_layer and "forward" not in vars(module):
        return "split by a plan that adds up the parts outside the experts: shard them with ep_size, or with fsdp_size"
    return None


def _check_engine(model: nn.Module) -> None:
    """Refuse settings of transformers' `DistributedConfig` under which processes would edit different things."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    if config is None or not getattr(model, "is_distributed_loading_by_transformers", False):
        return
    reasons = {
        "pp_size": (config.pp_size > 1, "each process has other layers; use fsdp_size or ep_size"),
        "fsdp_cpu_offload": (config.fsdp_cpu_offload, "the edited expert would stay on the CPU; load without"),
        "fsdp_mixed_precision": (config.fsdp_mixed_precision, "adapters are not cast; load with dtype='bfloat16'"),
    }
    for option, (chosen, reason) in reasons.items():
        if chosen:
            raise UnsupportedModelError(f"cannot edit a model with DistributedConfig({option}=...): {reason}")


def _offloads(hook: Any) -> bool:
    """Whether one of accelerate's hooks, or of a sequence of them, brings weights in for each call only."""
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", (hook,)))


def _check_same_base(config: UOEConfig, blocks: dict[str, MoEBlock], model: nn.Module) -> None:
    """Record what the target layers look like; or compare with what a saved adapter was made for."""
    found = {layer: _describe(block) for layer, block in blocks.items()}
    for layer, experts in found.items():
        expected = experts if config.base_experts is None else config.base_experts.get(layer)
        if expected != experts:
            raise ValueError(
                f"the adapter was made for another model: layer {layer} of {type(model).__name__} has {experts}, the "
                f"adapter expects {expected}"
            )
    config.base_experts = found


def _describe(block: MoEBlock) -> dict[str, Any]:
    shapes = {name: list(block.storage.shape(name)) for name in block.storage.projections}
    neurons = getattr(block.storage.module, "neurons_fingerprint", None)  # of a dense layer, in groups of neurons
    return {"num_experts": block.num_experts, "shapes": shapes} | ({"neurons": neurons} if neurons else {})
