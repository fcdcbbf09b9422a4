"""Forward passes that end early, or leave an expert out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.blocks import MoEBlock
from uoe_peft.moe.experts import ListedExperts
from uoe_peft.moe.routing import select_blocks, selection_inputs


class _LastLayerRouted(Exception):
    """Ends a forward pass; never seen outside `run_until_routed`."""


@contextmanager
def run_until_routed(model: nn.Module, layer_idx: int) -> Iterator[Callable[..., None]]:
    """A forward pass that ends as soon as a layer has routed its tokens, and never reaches the LM head.

    Enter it inside `record_routing`, whose hooks then run before the one that ends the pass. Of a model that FSDP2 has
    sharded the whole pass runs.

    Args:
        model: The model.
        layer_idx: Decoder layer after whose router the pass ends.

    Yields:
        A function that takes the decoder's keyword inputs and returns nothing.

    Raises:
        UnsupportedModelError: The model has no routed experts, or is an encoder-decoder.
        ValueError: The layer has no routed experts.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder, whose decoder cannot run alone; use a decoder-only model"
        )
    (block,) = select_blocks(model, [layer_idx])
    decoder = find_runnable(model)

    def stop(*_: object) -> None:
        raise _LastLayerRouted

    def run(**inputs: Any) -> None:
        try:
            decoder(**inputs, use_cache=False)
        except _LastLayerRouted:
            return

    if decoder is not find_decoder(model):
        yield run  # a pass that ends half-way would leave a layer of FSDP unsharded
        return
    if isinstance(block.storage, ListedExperts):
        # Experts in a plain list are not called as a module, and their selection may be made after the router.
        parent = model.get_submodule(block.experts_name.rpartition(".")[0])
        handle = parent.register_forward_hook(stop)
    else:
        handle = block.experts.register_forward_pre_hook(stop)
    try:
        yield run
    finally:
        handle.remove()


def find_decoder(model: nn.Module) -> nn.Module:
    """The decoder of a language model, under PEFT and the LM head; the model itself where it has none."""
    # Methods of classes that this package does not know: PEFT's wrapper, and transformers' models.
    for method in ("get_base_model", "get_decoder"):
        found = getattr(model, method)() if hasattr(model, method) else model
        model = found if isinstance(found, nn.Module) else model
    return model


def find_runnable(model: nn.Module) -> Callable[..., Any]:
    """The decoder to call; of a model that FSDP2 has sharded, all of it: FSDP does not let a part be called first."""
    base: nn.Module = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    roots = [module for module in (model, base) if isinstance(cast(object, module), FSDPModule)]
    if not roots:
        return find_decoder(model)
    takes = inspect.signature(base.forward).parameters
    return partial(roots[0], logits_to_keep=1) if "logits_to_keep" in takes else partial(roots[0])


@contextmanager
def silence_expert(block: MoEBlock, expert_idx: int) -> Iterator[None]:
    """Inside the context one expert contributes zero; the other selected experts keep their weights.

    Args:
        block: The expert's block, as `find_moe_blocks` gives it.
        expert_idx: The expert, 0 to E - 1.

    Raises:
        ValueError: The expert is out of range.
    """
    if not 0 <= expert_idx < block.num_experts:
        raise ValueError(
            f"layer {block.layer_idx} has {block.num_experts} experts, got expert_idx={expert_idx}; "
            f"use 0 to {block.num_experts - 1}"
        )

    def zero_weight(
        experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        selection = selection_inputs(args, kwargs)
        if selection is None:  # dense contract: weighted inputs of all tokens, one expert after the other
            inputs = args[0].clone()
            num_tokens = block.storage.num_tokens(args, kwargs)
            inputs[expert_idx * num_tokens : (expert_idx + 1) * num_tokens] = 0
            return (inputs, *args[1:]), kwargs
        index, weights = selection
        silenced = weights.masked_fill(index == expert_idx, 0)
        if "top_k_weights" in kwargs:
            return args, {**kwargs, "top_k_weights": silenced}
        return (*args[:2], silenced, *args[3:]), kwargs

    def zero_output(expert: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    if isinstance(block.storage, ListedExperts):
        handle = list(block.experts.children())[expert_idx].register_forward_hook(zero_output)
    else:
        handle = block.experts.register_forward_pre_hook(zero_weight, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()
