"""Models that an attack may change: copies without wrappers, and adapters switched in part for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from uoe_peft.errors import NotApplicableError
from uoe_peft.evaluation.attacks.result import CausalLM
from uoe_peft.moe.lm_head import independent_copy
from uoe_peft.tuner import UOEConfig

Scaling = dict[str, float]


def plain_copy(model: CausalLM) -> PreTrainedModel:
    """A copy of a model with its active adapters merged and every parameter trainable, in evaluation mode.

    Raises:
        ValueError: Weights are offloaded, or an adapter cannot be merged.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has offloaded weights; load it onto a device before it is attacked")
    copied = independent_copy(model)
    plain = _merged(copied) if isinstance(copied, PeftModel) else copied
    return cast(PreTrainedModel, plain.requires_grad_(True).eval())


def _merged(model: PeftModel) -> PreTrainedModel:
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"an adapter of type {model.active_peft_config.peft_type} cannot be merged; attack models with an adapter "
            "that can be (UOE, LoRA), or with none"
        )
    status = model.get_model_status()
    # PEFT says "irregular" where layers differ; merging then merges in each layer what is not merged there.
    merged = [] if status.merged_adapters == "irregular" else status.merged_adapters
    done = status.enabled is False or set(status.active_adapters) <= set(merged)
    tuner = cast(Any, model.base_model)
    return cast(PreTrainedModel, tuner.unload() if done else tuner.merge_and_unload())


@dataclass(frozen=True)
class AdapterScale:
    """The scale of a model's active adapters, in some of their layers or in all.

    Scales are changed and not the adapter's switch, which PEFT does not give back as it was: switched on again,
    a frozen adapter is trainable.
    """

    names: list[str]
    layers: list[Scaling]

    @classmethod
    def of(
        cls, model: CausalLM, *, attack: str, layers: Callable[[nn.Module], bool] = lambda layer: True
    ) -> AdapterScale:
        """The scale of a model whose adapters are scaled sums: UOE, or LoRA in its plain form.

        Args:
            model: The model.
            attack: Name of the attack, for messages.
            layers: Tells the layers that count.

        Raises:
            NotApplicableError: The model has no adapter, one that is no scaled sum, or none in such a layer.
            ValueError: The adapter is switched off or merged.
        """
        names = _active(check_adapter(model, attack=attack))
        found = [scaling for layer in model.modules() if layers(layer) and (scaling := _scaling(layer)) is not None]
        if not any(name in scaling for name in names for scaling in found):
            raise NotApplicableError(
                f"{attack}: the adapters {names} change nothing there, so that nothing can be given back"
            )
        return cls(names, found)

    @contextmanager
    def times(self, factor: float) -> Iterator[None]:
        """Inside the context the present scale is multiplied by a factor; at 0 the layers are the base's."""
        before = [dict(scaling) for scaling in self.layers]
        try:
            for scaling in self.layers:
                scaling.update({name: scaling[name] * factor for name in self.names if name in scaling})
            yield
        finally:
            for scaling, own in zip(self.layers, before, strict=True):
                scaling.update(own)


def check_adapter(model: CausalLM, *, attack: str) -> PeftModel:
    """The model, if its active adapters can be scaled; see `AdapterScale.of` for what is refused."""
    if not isinstance(model, PeftModel):
        raise NotApplicableError(f"{attack} needs a PeftModel, whose adapter it scales, got {type(model).__name__}")
    status = model.get_model_status()
    if status.merged_adapters:
        raise ValueError(f"{attack}: the adapters {status.merged_adapters} are merged; call unmerge_adapter() first")
    if status.enabled is not True:  # or switched off in some layers
        raise ValueError(f"{attack}: the adapter is switched off; enable it first")
    for name in _active(model):
        reason = _not_a_scaled_sum(model.peft_config[name])
        if reason:
            raise NotApplicableError(f"{attack} needs an adapter that is a scaled sum, but adapter {name!r} {reason}")
    return model


def edited_experts(model: CausalLM, *, attack: str) -> list[tuple[int, int]]:
    """`(layer_idx, expert_idx)` of the experts that the active UOE adapters edit, sorted.

    Raises:
        NotApplicableError: There is no such adapter.
    """
    configs = [model.peft_config[name] for name in _active(model)] if isinstance(model, PeftModel) else []
    pairs = [pair for config in configs if isinstance(config, UOEConfig) for pair in config.target_experts]
    if not pairs:
        raise NotApplicableError(f"{attack} needs a model with a UOE adapter, got {type(model).__name__} without one")
    return sorted(set(pairs))


def _active(model: CausalLM) -> list[str]:
    active = cast(Any, model).active_adapters
    return list(active() if callable(active) else active)


def _scaling(layer: nn.Module) -> Scaling | None:
    """The scales of an adapter's layer by name of the adapter; attention modules have a float of this name."""
    scaling = layer.__dict__.get("scaling")
    return scaling if isinstance(scaling, dict) and hasattr(layer, "active_adapters") else None


def _not_a_scaled_sum(config: Any) -> str:
    """Why scaling an adapter to 0 would not give the base; empty where it does."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ("UOE", "LORA"):
        return f"is of type {kind}; known are UOE and LORA"
    for option in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, option, None):
            return f"has {option}, which no scale changes"
    if getattr(config, "use_dora", False) or getattr(config, "bias", "none") != "none":
        return "has trained magnitudes or biases (use_dora, bias), which no scale changes"
    return ""
