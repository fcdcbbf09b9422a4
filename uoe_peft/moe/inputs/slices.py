"""What the matrices of one expert are multiplied with.

Nothing here knows an activation or a layout of gates: where experts are stacked, one of them is computed again from
what its module was called with, and the products are watched; where experts are modules of their own, what their linear
layers get is kept while the model runs.

Letters: T tokens of a batch, padding included, N of them routed to one expert, K experts per token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.blocks import MoEBlock
from uoe_peft.moe.experts import ListedExperts, unwrap
from uoe_peft.moe.inputs.routers import ProductSpy
from uoe_peft.moe.routing import record_routing


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """What one expert's matrices were multiplied with in one forward pass.

    Attributes:
        by_projection: The inputs of each matrix. Shape `(N, in)` each.
        weight: What the layer multiplies the expert's outputs by. Shape `(N,)`.
        token: Index of each such token in the batch, flattened to T tokens. Shape `(N,)`.
    """

    by_projection: dict[str, Tensor]
    weight: Tensor
    token: Tensor


@contextmanager
def record_expert_inputs(
    model: nn.Module, block: MoEBlock, expert_indices: Sequence[int]
) -> Iterator[Callable[[int], ExpertInputs]]:
    """What the matrices of single experts were multiplied with, in the latest forward pass inside the context.

    Enter it before `run_until_routed`, whose hook ends the pass. An adapter below the layer takes part as it is. The
    layer's own deltas of experts take part only where experts are modules of their own: put them away to measure.

    Args:
        model: The model.
        block: One of its blocks, as `find_moe_blocks` gives it.
        expert_indices: Experts, 0 to E - 1.

    Yields:
        A function of an expert's index. It raises `UnsupportedModelError` where the pass cannot be understood.

    Raises:
        ValueError: There is no such expert.
    """
    unknown = [index for index in expert_indices if not 0 <= index < block.num_experts]
    if unknown:
        raise ValueError(
            f"layer {block.layer_idx} has {block.num_experts} experts, got expert_idx={unknown[0]}; "
            f"use 0 to {block.num_experts - 1}"
        )
    record = _record_listed if isinstance(block.storage, ListedExperts) else _record_stacked
    with record(model, block, expert_indices) as recorded:
        yield recorded


@contextmanager
def _record_stacked(
    model: nn.Module, block: MoEBlock, expert_indices: Sequence[int]
) -> Iterator[Callable[[int], ExpertInputs]]:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[:] = [(args, {name: value for name, value in kwargs.items() if name != "adapter_names"})]

    @torch.no_grad()
    def recorded(expert_idx: int) -> ExpertInputs:
        if not calls:
            raise _nothing_seen(block)
        tokens = block.storage.routed_tokens(expert_idx, *calls[0])
        weights = {name: block.storage.weight(name, expert_idx).detach() for name in block.storage.projections}
        with ExitStack() as stack:
            spies = {name: stack.enter_context(ProductSpy(weight)) for name, weight in weights.items()}
            block.storage.forward_expert(tokens.hidden_states, expert_idx, weights)
        inputs = {name: spy.factor for name, spy in spies.items() if spy.factor is not None}
        if inputs.keys() != weights.keys():
            raise _nothing_seen(block)
        return ExpertInputs(inputs, tokens.weight.flatten(), tokens.token)

    handle = block.experts.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield recorded
    finally:
        handle.remove()


@contextmanager
def _record_listed(
    model: nn.Module, block: MoEBlock, expert_indices: Sequence[int]
) -> Iterator[Callable[[int], ExpertInputs]]:
    storage = cast(ListedExperts, block.storage)
    entered: list[Tensor] = []
    seen: dict[tuple[int, str], Tensor] = {}

    def enter(parent: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.clear()
        hidden_states = next(iter((*args, *kwargs.values())))  # (B, S, H)
        entered[:] = [hidden_states.detach().reshape(-1, hidden_states.shape[-1])]

    def keep(key: tuple[int, str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(linear: nn.Module, args: tuple[Any, ...]) -> None:
            seen[key] = args[0].detach()

        return hook

    def recorded(expert_idx: int) -> ExpertInputs:
        if not entered:
            raise _nothing_seen(block)
        routing, flat = trace[block.layer_idx], entered[0]
        inputs = {name: seen.get((expert_idx, name), _no_rows(storage, name, flat)) for name in storage.projections}
        for token, position in _orders(routing.top_k_index == expert_idx):
            if torch.equal(flat[token], inputs[storage.projections[0]]):
                return ExpertInputs(inputs, routing.top_k_weights[token, position], token)
        raise _nothing_seen(block)

    parent = model.get_submodule(block.experts_name.rpartition(".")[0])
    handles = [parent.register_forward_pre_hook(enter, with_kwargs=True)]
    for expert_idx in expert_indices:
        for name in storage.projections:
            linear = unwrap(storage.module.get_submodule(storage.linear_name(name, expert_idx)))
            handles.append(linear.register_forward_pre_hook(keep((expert_idx, name))))
    try:
        with record_routing(model, layer_indices=[block.layer_idx]) as trace:
            yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _orders(chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Token and place of each selection, in the orders in which blocks gather them. Shape of `chosen`: `(T, K)`."""
    token, position = torch.where(chosen)
    yield token, position
    position, token = torch.where(chosen.T)
    yield token, position


def _no_rows(storage: ListedExperts, projection: str, like: Tensor) -> Tensor:
    """The inputs of an expert that was not called, since no token was routed to it."""
    return like.new_empty(0, storage.shape(projection)[1])


def _nothing_seen(block: MoEBlock) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot see what the experts {block.experts_name}, a {type(unwrap(block.experts)).__name__}, multiply: "
        "expected a forward pass that calls them with the hidden states of the tokens that are routed to each; the "
        "model must not be compiled"
    )
