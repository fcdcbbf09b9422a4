"""What may be loaded into an adapter: its own tensors, all of them, and finite; and what to do where that fails."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from uoe_peft.tuner.merging import UOELayer


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], *, prefix: str) -> None:
    """Whether a state dict is what an adapter of the model needs.

    Args:
        model: The model that has the adapter, fresh.
        adapter_name: Name of the adapter.
        state_dict: By the names of the model's own state dict.
        prefix: What names of the method's parameters begin with.

    Raises:
        ValueError: A tensor is missing: a half-loaded adapter would only half forget. Or there is another, which would
            overwrite the base model. Or a shape differs, or a value is NaN or infinite.
    """
    own = {name: t for name, t in model.state_dict().items() if f".{prefix}" in name and f".{adapter_name}." in name}
    missing, other = set(own) - set(state_dict), set(state_dict) - set(own) - _saved_in_full(model, adapter_name)
    if missing or other:
        raise ValueError(
            f"the state dict does not fit adapter {adapter_name!r}: missing {sorted(missing)}, unexpected "
            f"{sorted(other)}; nothing was loaded"
        )
    for name, tensor in own.items():
        if state_dict[name].shape != tensor.shape:
            raise ValueError(
                f"size mismatch for {name}: adapter {adapter_name!r} has {tuple(tensor.shape)}, the state dict "
                f"{tuple(state_dict[name].shape)}; nothing was loaded"
            )
    broken = sorted(name for name in own if not torch.isfinite(state_dict[name]).all())
    if broken:
        raise ValueError(
            f"adapter {adapter_name!r} has values that are NaN or infinite in {broken}; nothing was loaded"
        )


def _saved_in_full(model: nn.Module, adapter_name: str) -> set[str]:
    """What `modules_to_save` puts into an adapter's file, by the model's names."""
    wrappers = {name: m for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    return {
        f"{name}.{key}" for name, m in wrappers.items() for key in m.adapter_state_dict_load_map(adapter_name).values()
    }


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter whose injection failed out of every layer, and wrappers that hold no other adapter away."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, UOELayer) and adapter_name in layer._all_available_adapter_names():
            # Otherwise PEFT makes another adapter active in its place.
            layer._active_adapter = [name for name in layer.active_adapters if name != adapter_name]
            layer.delete_adapter(adapter_name)
            if not layer.target_indices:
                model.set_submodule(path, layer.base_layer)
