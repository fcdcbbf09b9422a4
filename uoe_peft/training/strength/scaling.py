"""What was trained, made weaker: an adapter by its strength, whole weights by interpolation with what they were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft.tuner import UOEConfig, UOEModel


class CannotScale(ValueError):
    """What is trained cannot be made weaker so that the result is saved."""


class Scaling(Protocol):
    """The straight line from the base to what was trained."""

    def set(self, scale: float) -> None:
        """Go to a place on it: 0 is the base, 1 what was trained."""


@dataclass(frozen=True)
class AdapterScaling:
    """The strengths of adapters, by name, as they were in training."""

    model: PeftModel
    strengths: Mapping[str, float]

    def set(self, scale: float) -> None:
        """Give each adapter this part of its strength; its config, which is saved, then says so."""
        for name, strength in self.strengths.items():
            cast(UOEModel, self.model.base_model).set_strength(scale * strength, name)


@dataclass(frozen=True)
class Interpolation:
    """Weights before and after training, by name, on the CPU."""

    model: nn.Module
    base: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]

    @torch.no_grad()
    def set(self, scale: float) -> None:
        """Write `base + scale * (trained - base)`, computed in at least float32; at 0 and 1 every bit is theirs."""
        for name, parameter in trained_parameters(self.model).items():
            base, trained = self.base[name], self.trained[name]
            wide = torch.promote_types(base.dtype, torch.float32)
            at = {0.0: base, 1.0: trained}.get(scale)
            parameter.copy_(torch.lerp(base.to(wide), trained.to(wide), scale) if at is None else at)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


def trained_adapters(model: PeftModel) -> list[str]:
    """Names of the active adapters that are trained.

    Raises:
        CannotScale: They are of a kind that has no strength of its own, or train modules in full beside it.
    """
    if not isinstance(model.base_model, UOEModel):
        kinds = sorted({str(getattr(c.peft_type, "value", c.peft_type)) for c in model.peft_config.values()})
        raise CannotScale(
            f"adapters of type {', '.join(kinds)} have no strength that PEFT would save with them; UOE adapters do"
        )
    trained = model.get_model_status().requires_grad  # True, False or "irregular" by adapter
    names = [name for name in model.active_adapters if trained.get(name) is not False]
    for name in names:
        in_full = _config(model, name).modules_to_save
        if in_full:
            raise CannotScale(f"the adapter {name!r} trains {sorted(in_full)} in full, which its strength leaves out")
    return names


def adapter_scaling(model: PeftModel) -> AdapterScaling:
    """The line on which the trained adapters are now at 1.

    Raises:
        CannotScale: See `trained_adapters`.
    """
    return AdapterScaling(model, {name: _config(model, name).strength for name in trained_adapters(model)})


def restore_strengths(model: nn.Module, folder: Path) -> None:
    """Give the active UOE adapters the strengths that a checkpoint was written with.

    Args:
        model: Any model; others than those with UOE adapters are left alone.
        folder: Where `save_pretrained` wrote it: the adapter "default" itself, others in folders of their names.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, UOEModel):
        return
    for name in model.active_adapters:
        saved = (folder if name == "default" else folder / name) / "adapter_config.json"
        if saved.is_file():
            config: dict[str, Any] = json.loads(saved.read_text(encoding="utf-8"))
            model.base_model.set_strength(config.get("strength", 1.0), name)


def _config(model: PeftModel, name: str) -> UOEConfig:
    return cast(UOEConfig, model.peft_config[name])
