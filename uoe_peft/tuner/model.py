"""UOE as a PEFT tuner: puts delta layers on target experts and on their routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from uoe_peft.moe.passes import keep_layers
from uoe_peft.tuner.arguments import as_number
from uoe_peft.tuner.combining import CombinationType, SignMethod, check_combination, combination, combined_config
from uoe_peft.tuner.config import UOEConfig
from uoe_peft.tuner.loading import check_state_dict, withdraw
from uoe_peft.tuner.merging import UOELayer
from uoe_peft.tuner.mixed_batches import copies_per_sample, handed_out
from uoe_peft.tuner.targets import find_targets


class UOEModel(BaseTuner):
    """A Mixture-of-Experts model in which single experts, and the routers of their layers, have trainable deltas.

    Made by :func:`peft.get_peft_model` from a :class:`UOEConfig`. Method: https://arxiv.org/abs/2411.18797.

    A file is checked before anything of it is loaded, by `PeftModel.from_pretrained` and `PeftModel.load_adapter`. Of
    transformers' own `model.load_adapter` PEFT hears nothing: a file can overwrite base weights there. Use it for files
    of your own alone.

    Raises:
        UnsupportedModelError: The model has no Mixture-of-Experts block that this package can read, or the weights to
            edit are sharded or offloaded.
        ValueError: A target layer, expert or projection does not exist; or an adapter was made for another model.
    """

    prefix = "uoe_"
    tuner_layer_cls = UOELayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (the base class' declaration)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on the model, or, where that fails, leave the model as it was.

        Arguments as in the base class.
        """
        # Injection fills in what it finds: not in the caller's object, which may serve another model next.
        config = deepcopy(cast(UOEConfig, self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        config.awaits_state = config.base_experts is not None  # it was saved once, so its tensors are to come
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            withdraw(model, adapter_name)
            raise

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> UOEConfig:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        _reshard(model)
        self._targets = find_targets(peft_config, model)
        keep_layers(model, {target.block.layer_idx for target in self._targets.values()})
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

    def _layers(self) -> list[UOELayer]:
        return [module for module in self.model.modules() if isinstance(module, UOELayer)]

    def set_strength(self, strength: float, adapter_name: str | None = None) -> None:
        """Set the factor on every delta of an adapter, experts' and routers'; it is saved with the adapter.

        A straight line leads from the base model (0) over the trained adapter (1) and beyond. PEFT's `set_scale`,
        `scale_layer` and `unscale_layer` go on working, relative to it.

        Args:
            strength: Finite, >= 0.
            adapter_name: Name of the adapter; None: the active ones.

        Raises:
            ValueError: The strength is out of range, there is no such adapter, or it is merged.
        """
        strength = as_number("strength", strength, zero=True)
        names = self.active_adapters if adapter_name is None else [adapter_name]
        self._check_known(names)
        merged = {name for layer in self._layers() for name in layer.merged_adapters}
        if merged.intersection(names):
            raise ValueError(f"adapters {sorted(merged.intersection(names))} are merged; call unmerge_adapter() first")
        for name in names:
            cast(UOEConfig, self.peft_config[name]).strength = strength
            for layer in self._layers():
                if name in layer.target_indices:
                    layer.set_strength(name, strength)

    def _check_known(self, names: list[str]) -> None:
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown or not names:
            raise ValueError(f"adapters {unknown or names} not found; the model has {sorted(self.peft_config)}")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights of every layer, or of none where a layer refuses or fails.

        Args:
            adapter_names: Which adapters; None: the active ones.
            safe_merge: Check for values that are not finite before anything is written.

        Raises:
            ValueError: `safe_merge` found such a value, or there is no such adapter.
            RuntimeError: Base weights are sharded, offloaded or quantised.
        """
        if isinstance(adapter_names, list):
            self._check_known(adapter_names)
        _reshard(self.model)
        before = {layer: list(layer.merged_adapters) for layer in self._layers()}
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
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
        # Layers come out of their wrappers as they are now: what is merged stays merged.
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # FSDP2 shards an adapter with the layer that it is on. All processes come here together, and one writes.
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            check_state_dict(model, adapter_name, remapped, prefix=cls.prefix)
        except ValueError:
            if config.awaits_state and isinstance(model, PeftModel):
                # It was put on for this file: without it, it would be an adapter that changes nothing.
                others = set(model.peft_config) - {adapter_name}
                model.delete_adapter(adapter_name) if others else cast(UOEModel, model.base_model).unload()
            raise
        config.awaits_state = False
        return remapped

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
    ) -> None:
        """Add an adapter that other adapters are combined to.

        The new adapter edits every expert that one of the others edits. Its deltas are full if one of theirs is.

        Args:
            adapters: Names of the adapters to combine.
            weights: A weight for each, of either sign.
            adapter_name: Name of the new adapter.
            combination_type: "linear": the exact sum (ranks add up). "svd": the nearest low-rank deltas. "cat": the
                exact sum of adapters that must edit different experts. "ties", "dare_linear", "dare_ties" and
                "magnitude_prune" prune the deltas before they are added, as in PEFT's LoRA, but the deltas themselves
                and not their factors: the result is full, or with the ending "_svd" the nearest of a rank.
            svd_rank: Rank for "svd" and what ends with it; None: the largest rank of the adapters.
            density: Share of the values that pruning keeps, in (0, 1]; DARE draws them with torch's generator.
            majority_sign_method: How TIES finds a value's sign, by "total" mass or "frequency".

        Sums are computed and kept in float32. Each adapter counts with its strength; the new one has strength 1.

        Raises:
            ValueError: An unknown adapter or combination, a taken name, unequal lengths, weights that are not finite, a
                rank below 1, a density that is missing or out of range, an option that the combination does not use,
                modules that are saved in full, or for "cat" an expert that two of the adapters edit.
        """
        check_combination(self.model, self.peft_config, adapters, weights, adapter_name)
        configs = [cast(UOEConfig, self.peft_config[name]) for name in adapters]
        config = combined_config(configs, combination_type, svd_rank)
        combine = combination(combination_type, density, majority_sign_method)
        by_name = dict(zip(adapters, map(float, weights), strict=True))
        try:
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            self._cast_adapter_dtype(adapter_name)
            self.set_requires_grad(adapter_name, False)
            for layer in self._layers():
                if adapter_name in layer.target_indices:
                    exact = combination_type in ("linear", "cat") and adapter_name in layer.uoe_A
                    layer.set_combination(adapter_name, by_name, combine=None if exact else combine)
        except BaseException:
            withdraw(self.model, adapter_name)
            del self.peft_config[adapter_name]
            raise

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
        if unknown or not len(adapter_names):
            raise ValueError(f"adapter_names {unknown} not found; the model has {sorted(self.peft_config)}")
        copies = copies_per_sample(self.model, kwargs)
        with handed_out(adapter_names, self.model, self._layers(), num_copies=copies):
            yield


def _reshard(model: nn.Module) -> None:
    """Let go of what passes have left whole, where FSDP2 manages a model: freezing or merging would change a copy."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
