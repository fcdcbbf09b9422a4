"""Dense feed-forward layers become groups of neurons, and these become dense layers again.

The idea of grouping neurons is that of https://arxiv.org/abs/2110.01786 (MoEfication) and of
https://arxiv.org/abs/2408.11855 (FactorLLM). There a router then leaves groups out, and the model changes; here all
groups are used by every token, so that the model computes the same.
"""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import nn

from uoe_peft.dense.block import GroupedMLP
from uoe_peft.dense.groups import NeuronGroups
from uoe_peft.dense.layers import find_dense_layers
from uoe_peft.errors import UnsupportedModelError

Model = TypeVar("Model", bound=nn.Module)


def factorize(model: Model, groups: NeuronGroups) -> Model:
    """Put the neurons of a dense model's feed-forward layers into groups, which UOE then takes for experts.

    The model is changed in place and computes the same logits up to rounding. Nothing is copied twice: a layer's
    weights move from the dense layer into its groups, and by :func:`to_dense` back.

    Args:
        model: A dense causal language model whose feed-forward modules are a `gate_proj`, an `up_proj` and a
            `down_proj`. Without weights, on the meta device, nothing but names and shapes is checked.
        groups: Groups of the neurons of some or all of its layers.

    Returns:
        The same model. `save_pretrained` refuses until it is dense again.

    Raises:
        UnsupportedModelError: The model has routed experts or an adapter, its feed-forward modules are of another kind
            or compute something else than `down(act(gate(x)) * up(x))`, or the weights are not in memory.
        ValueError: The groups name a layer that the model has not, or another number of neurons.
    """
    paths = find_dense_layers(model)
    _check_fit(model, paths, groups)
    for layer_idx in groups.by_layer:  # all of them before the first is changed
        _check_computes(paths[layer_idx], model.get_submodule(paths[layer_idx]))
    for layer_idx in groups.by_layer:
        mlp = model.get_submodule(paths[layer_idx])
        block = GroupedMLP(mlp, groups.order(layer_idx), fingerprint=groups.fingerprint(layer_idx))
        block.empty_dense()
        model.set_submodule(paths[layer_idx], block)
    vars(model)["save_pretrained"] = _refuse_to_save
    return model


def to_dense(model: Model) -> Model:
    """The dense model again, with whatever was merged into its groups: an ordinary model of its family.

    Weights that were not edited are the original ones, bit for bit, and every neuron is in its old place.

    Args:
        model: What :func:`factorize` returned, perhaps by way of `PeftModel.merge_and_unload`. Changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: The model is not factorized, or has an adapter that is not merged.
    """
    paths = [name for name, module in model.named_modules() if isinstance(module, GroupedMLP)]
    if not paths:
        raise ValueError(f"{type(model).__name__} is not factorized; expected what uoe_peft.dense.factorize returned")
    wrapped = [name for name, module in model.named_modules() if "base_layer" in module._modules]
    if wrapped:
        raise ValueError(
            f"{wrapped[0]} has an adapter; call merge_and_unload() of the PeftModel first, and pass what it returns"
        )
    for path in paths:
        model.set_submodule(path, cast(GroupedMLP, model.get_submodule(path)).dense())
    vars(model).pop("save_pretrained", None)
    return model


def _refuse_to_save(*args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        "a factorized model is not saved as it is: no family could load its groups. Save the adapter, whose base is "
        "the dense model; or merge it, and save to_dense(model)"
    )


def _check_fit(model: nn.Module, paths: dict[int, str], groups: NeuronGroups) -> None:
    for layer_idx, own in groups.by_layer.items():
        if layer_idx not in paths:
            raise ValueError(
                f"the groups are of another model: they name layer {layer_idx}, {type(model).__name__} has "
                f"feed-forward modules in the layers {[*paths][:3]} to {max(paths)}"
            )
        size = cast(nn.Linear, model.get_submodule(f"{paths[layer_idx]}.gate_proj")).out_features
        if len(own) != size:
            raise ValueError(
                f"the groups are of another model: they have {len(own)} neurons in layer {layer_idx}, "
                f"{type(model).__name__} has {size}"
            )


@torch.no_grad()
def _check_computes(path: str, mlp: nn.Module) -> None:
    """See on random inputs that the module computes what groups can be summed to: families may do more."""
    parts: Any = mlp
    weight = parts.gate_proj.weight
    if weight.is_meta:
        return
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = parts.down_proj(parts.act_fn(parts.gate_proj(x)) * parts.up_proj(x))
    was_training = mlp.training
    try:
        found = mlp.eval()(x)
    finally:
        mlp.train(was_training)
    tolerance = 16 * torch.finfo(weight.dtype).eps * float(expected.float().abs().max())
    if found.shape != expected.shape or float((found - expected).float().abs().max()) > tolerance:
        raise UnsupportedModelError(
            f"cannot factorize {path}: {type(mlp).__name__} computes something else than "
            "down_proj(act_fn(gate_proj(x)) * up_proj(x)), which groups of neurons would not add up to"
        )
