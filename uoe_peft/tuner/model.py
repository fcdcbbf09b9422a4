"""UOE as a PEFT tuner: puts delta layers on target experts and on their routers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from uoe_peft.moe import ListedExperts, MoEBlock, find_moe_blocks
from uoe_peft.tuner.config import UOEConfig
from uoe_peft.tuner.delta import UOELayer
from uoe_peft.tuner.layer import UOEExpertsLayer, UOELinearLayer, UOERouterLayer


@dataclass(frozen=True)
class _Target:
    """What an adapter edits in one module."""

    block: MoEBlock
    kind: Literal["experts", "linear", "router"]
    projections: tuple[str, ...]
    indices: tuple[int, ...]
    delta_type: str
    writes_output: bool = False  # of a linear module: whether its output is the expert's

    def wrap(self, module: nn.Module, adapter_name: str) -> UOELayer:
        match self.kind:
            case "experts":
                return UOEExpertsLayer(module, adapter_name, storage=self.block.storage)
            case "linear":
                return UOELinearLayer(module, adapter_name, writes_output=self.writes_output)
            case "router":
                return UOERouterLayer(module, adapter_name, gate_name=self.block.gate_name)


class UOEModel(BaseTuner):
    """A Mixture-of-Experts model in which single experts, and the routers of their layers, have trainable deltas.

    Made by :func:`peft.get_peft_model` from a :class:`UOEConfig`. Method: https://arxiv.org/abs/2411.18797.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts block that this package can read.
        ValueError: A target layer, expert or projection does not exist; or an adapter was made for another model.
    """

    prefix = "uoe_"
    tuner_layer_cls = UOELayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (the base class' declaration)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> UOEConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._targets = _find_targets(peft_config, model)
        peft_config.target_modules = set(self._targets)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _create_and_replace(
        self,
        peft_config: Any,
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

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights of every layer, or of none where a layer refuses.

        Args:
            adapter_names: Which adapters; None: the active ones.
            safe_merge: Check for values that are not finite before anything is written.

        Raises:
            ValueError: `safe_merge` found such a value.
            RuntimeError: Base weights are sharded, offloaded or quantised.
        """
        before = {m: list(m.merged_adapters) for m in self.model.modules() if isinstance(m, UOELayer)}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except (ValueError, RuntimeError):
            for layer, names in before.items():
                if layer.merged_adapters != names:
                    layer.unmerge()
                    layer.merge(adapter_names=names)
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        # What is merged stays merged in the modules that come out of their wrappers.
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT loads what fits and says nothing of the rest; a half-loaded adapter would only half forget.
        expected = {name for name in model.state_dict() if f".{cls.prefix}" in name and f".{adapter_name}." in name}
        given = {name for name in remapped if f".{cls.prefix}" in name}
        if expected != given:
            raise ValueError(
                f"the state dict does not fit adapter {adapter_name!r}: missing {sorted(expected - given)}, "
                f"unexpected {sorted(given - expected)}"
            )
        return remapped

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["linear", "svd", "cat"] = "linear",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter whose deltas are the weighted sum of other adapters' deltas.

        The new adapter edits every expert that one of the others edits. Its deltas are full if one of theirs is.

        Args:
            adapters: Names of the adapters to combine.
            weights: A weight for each, of either sign.
            adapter_name: Name of the new adapter.
            combination_type: "linear": the exact sum (ranks add up). "svd": the nearest low-rank deltas. "cat": the
                exact sum of adapters that must edit different experts.
            svd_rank: Rank for "svd"; None: the largest rank of the adapters.

        Raises:
            ValueError: An unknown adapter or combination, a taken name, unequal lengths, or for "cat" an expert that
                two of the adapters edit.
        """
        configs = self._configs_to_combine(adapters, weights, adapter_name)
        pairs = [pair for config in configs for pair in config.target_experts]
        if combination_type == "cat" and len(set(pairs)) < len(pairs):
            raise ValueError(f'combination_type="cat" needs adapters of different experts, got {sorted(pairs)}')
        self.peft_config[adapter_name] = _combined_config(configs, combination_type, svd_rank)
        self.inject_adapter(self.model, adapter_name)
        self.set_requires_grad(adapter_name, False)
        for layer in self.model.modules():
            if isinstance(layer, UOELayer) and adapter_name in layer.target_indices:
                layer.set_weighted_sum(adapter_name, dict(zip(adapters, weights, strict=True)))

    def _configs_to_combine(self, adapters: list[str], weights: list[float], adapter_name: str) -> list[UOEConfig]:
        unknown = sorted(set(adapters) - set(self.peft_config))
        if unknown or not adapters:
            raise ValueError(f"adapters {unknown or adapters} not found; the model has {sorted(self.peft_config)}")
        if len(set(adapters)) < len(adapters):
            raise ValueError(f"adapters must name each adapter once, got {adapters}")
        if len(adapters) != len(weights):
            raise ValueError(f"got {len(adapters)} adapters and {len(weights)} weights; pass one weight for each")
        if adapter_name in self.peft_config:
            raise ValueError(f"the model has an adapter {adapter_name!r} already; choose another adapter_name")
        return [cast(UOEConfig, self.peft_config[name]) for name in adapters]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: hand each layer the adapter of every sample, PEFT's `adapter_names` argument."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("cannot pass adapter_names in training mode; call model.eval() first")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(f"adapter_names {unknown} not found; the model has {sorted(self.peft_config)}")
        beams = kwargs.get("num_beams") or 1
        per_row = [name for name in adapter_names for _ in range(beams)]
        layers = [layer for layer in self.model.modules() if isinstance(layer, UOELayer)]
        hook = partial(_pass_adapter_names, adapter_names=per_row)
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_adapter_names(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _combined_config(configs: list[UOEConfig], combination_type: str, svd_rank: int | None) -> UOEConfig:
    """The config of a weighted sum of adapters."""
    match combination_type:
        case "svd":
            rank, delta_type = svd_rank or max(config.r for config in configs), "low_rank"
        case "linear" | "cat":
            rank = sum(config.r for config in configs)
            delta_type = "full" if any(config.delta_type == "full" for config in configs) else "low_rank"
        case _:
            raise ValueError(f'combination_type must be "linear", "svd" or "cat", got {combination_type!r}')
    routers = {config.router_delta_type for config in configs if config.train_router}
    trained = {layer_idx for config in configs for layer_idx, _ in config.target_experts if routers}
    corrected = {layer_idx for config in configs for layer_idx in config.corrected_router_layers or ()}
    projections = [config.target_projections for config in configs]
    return replace(
        configs[0],
        target_experts=sorted({pair for config in configs for pair in config.target_experts}),
        target_projections=None if None in projections else sorted({p for names in projections for p in names or ()}),
        delta_type=delta_type,
        r=rank,
        uoe_alpha=rank,  # scale 1
        use_rslora=False,
        init_weights=True,
        train_router=bool(routers),
        # What one adapter corrects and another trains must hold both: a correction is of any rank.
        router_delta_type="low_rank" if routers == {"low_rank"} and not trained & corrected else "full",
        corrected_router_layers=sorted(corrected - trained) or None,
        attribution=None,
        base_experts=None,
    )


def _find_targets(config: UOEConfig, model: nn.Module) -> dict[str, _Target]:
    """What to edit, for each module path."""
    if config.target_experts == "auto":
        raise ValueError(
            'target_experts="auto" needs a forget set: pass the config to UnlearningTrainer, or call '
            "attribute_experts and use target_experts=attribution.top(1)"
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
            targets |= _router_target(blocks[layer_idx], config.router_delta_type)
    for layer_idx in config.corrected_router_layers or ():
        targets |= correction_target(config, layer_idx, blocks, model)
    _check_same_base(config, {str(layer_idx): blocks[layer_idx] for layer_idx in by_layer}, model)
    return targets


def _expert_targets(config: UOEConfig, block: MoEBlock, experts: tuple[int, ...]) -> dict[str, _Target]:
    storage = block.storage
    projections = tuple(config.target_projections or storage.projections)
    unknown = sorted(set(projections) - set(storage.projections))
    if unknown:
        raise ValueError(f"{block.experts_name} has no target_projections {unknown}; it has {storage.projections}")
    if config.init_weights == "zero_expert" and storage.projections[-1] not in projections:
        raise ValueError(f'init_weights="zero_expert" needs {storage.projections[-1]!r} among target_projections')
    if not isinstance(storage, ListedExperts):
        return {block.experts_name: _Target(block, "experts", projections, experts, config.delta_type)}
    targets = {}
    for projection, expert_idx in product(projections, experts):
        last = projection == storage.projections[-1]
        path = f"{block.experts_name}.{storage.linear_name(projection, expert_idx)}"
        targets[path] = _Target(block, "linear", ("weight",), (expert_idx,), config.delta_type, writes_output=last)
    return targets


def _router_target(block: MoEBlock, delta_type: str) -> dict[str, _Target]:
    name = block.gate_name.removesuffix(".weight").replace(".", "_")
    return {block.router_name: _Target(block, "router", (name,), (0,), delta_type)}


def correction_target(
    config: UOEConfig, layer_idx: int, blocks: dict[int, MoEBlock], model: nn.Module
) -> dict[str, _Target]:
    """The router of a further layer, whose delta no optimiser trains, by its path."""
    _check_layer(layer_idx, blocks, model, option="corrected_router_layers")
    if config.train_router and layer_idx in {target_layer for target_layer, _ in config.target_experts}:
        raise ValueError(
            f"the router of layer {layer_idx} is trained with its target expert, got it in corrected_router_layers, "
            "too; name layers without target experts there, or set train_router=False"
        )
    return _router_target(blocks[layer_idx], "fixed")


def _check_pair(layer_idx: int, expert_idx: int, blocks: dict[int, MoEBlock], model: nn.Module) -> None:
    _check_layer(layer_idx, blocks, model, option="target_experts")
    num_experts = blocks[layer_idx].num_experts
    if expert_idx >= num_experts:
        raise ValueError(
            f"layer {layer_idx} of {type(model).__name__} has {num_experts} experts, got expert_idx={expert_idx}; "
            f"use 0 to {num_experts - 1}"
        )


def _check_layer(layer_idx: int, blocks: dict[int, MoEBlock], model: nn.Module, *, option: str) -> None:
    if layer_idx not in blocks:
        raise ValueError(
            f"layer {layer_idx} of {type(model).__name__} has no Mixture-of-Experts block, got layer_idx={layer_idx} "
            f"in {option}; use one of {sorted(blocks)}"
        )


def _check_same_base(config: UOEConfig, blocks: dict[str, MoEBlock], model: nn.Module) -> None:
    """Record what the target layers look like; or compare with what a saved adapter was made for."""
    found = {layer: _describe(block) for layer, block in blocks.items()}
    if config.base_experts is not None and config.base_experts != found:
        differing = sorted(layer for layer in found if config.base_experts.get(layer) != found[layer])
        raise ValueError(
            f"the adapter was made for another model: layer {differing[0]} of {type(model).__name__} has "
            f"{found[differing[0]]}, the adapter expects {config.base_experts.get(differing[0])}"
        )
    config.base_experts = found


def _describe(block: MoEBlock) -> dict[str, Any]:
    shapes = {name: list(block.storage.shape(name)) for name in block.storage.projections}
    return {"num_experts": block.num_experts, "shapes": shapes}
