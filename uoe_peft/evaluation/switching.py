"""The same model with its adapter off, on, or weaker; afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Inside the context the base model answers; afterwards every parameter requires a gradient or not, as before.

    PEFT's own `disable_adapter` leaves the active adapters trainable, whatever they were.

    Args:
        model: A model with an adapter that is on and not merged.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


@contextmanager
def before_unlearning(
    model: PeftModel | PreTrainedModel, base_model: PreTrainedModel | None
) -> Iterator[PeftModel | PreTrainedModel]:
    """Gives the base model: the one that is passed, or else the model itself with its adapter off."""
    if base_model is not None:
        yield base_model
        return
    assert isinstance(model, PeftModel)
    with adapter_off(model):
        yield model


@contextmanager
def scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Inside the context every delta of the active adapters counts `factor` times; afterwards exactly as before.

    Works for adapters whose layers have a scale, as UOE's and LoRA's. An adapter's other parts, such as whole modules
    that were trained with it, have none, and are refused.

    Args:
        model: A model with an adapter that is on and not merged.
        factor: At least 0; 1 changes nothing.

    Raises:
        ValueError: `factor` is negative or not finite, the adapter is merged, has layers without a scale, or none.
    """
    if not 0 <= factor < float("inf"):
        raise ValueError(f"factor must be finite and at least 0, got {factor}")
    layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    layers = [layer for layer in layers if hasattr(layer, "scale_layer")]
    _check_scalable(model, layers)
    before = [dict(layer.scaling) for layer in layers]  # type: ignore[arg-type]
    try:
        # Not by the layers' own `scale_layer`: a layer may remember what it was multiplied by beside the product.
        for layer in layers if factor != 1 else ():
            scaling: dict[str, float] = layer.scaling  # type: ignore[assignment]
            scaling.update({name: scaling[name] * factor for name in layer.active_adapters if name in scaling})  # type: ignore[union-attr]
        yield
    finally:
        # Dividing by the factor would round, and cannot undo 0.
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.clear()  # type: ignore[union-attr, operator]
            layer.scaling.update(scaling)  # type: ignore[union-attr, operator]


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Without dropout or gradients; afterwards every module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _check_scalable(model: nn.Module, layers: list[nn.Module]) -> None:
    known = {id(module) for layer in layers for module in layer.modules()}
    others = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "adapter_layer_names") and id(module) not in known
    ]
    others += [name for name, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    if not layers or others:
        what = f"the layers {others[:3]} have none" if others else "it has no layers with a scale"
        raise ValueError(f"the adapter of {type(model).__name__} cannot be scaled: {what}; use UOE or LoRA layers only")
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("the adapter is merged, so its scale would change nothing; call unmerge_adapter() first")
