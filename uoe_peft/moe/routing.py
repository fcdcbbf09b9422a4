"""Routing decisions of a forward pass, recorded by hooks on the routers and experts of a model.

Letters: T = B * S tokens (padding included: masks are the caller's), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from uoe_peft.moe import gating
from uoe_peft.moe.blocks import MoEBlock, find_moe_blocks
from uoe_peft.moe.experts import ListedExperts, unwrap


@dataclass(frozen=True, eq=False)
class LayerRouting:
    """Routing decisions of one layer.

    Attributes:
        scores: Router scores, float32, >= 0, sum 1 over the experts of each token; with gradient where autograd
            records. A softmax router's probabilities; for other routers their own scores, normalised. Shape `(T, E)`.
            Families with classes that compute nothing (a skip expert) have further columns for them. Of experts that
            every token uses, their shares of what the layer computes for the token.
        top_k_index: Selected experts. Shape `(T, K)`, int64.
        top_k_weights: Weights that the layer applies to their outputs; 0 where a selection was cancelled. Shape
            `(T, K)`.
    """

    scores: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor

    def to(self, device: torch.device | None) -> LayerRouting:
        """The same on a device; None leaves it where the layer is."""
        if device is None:
            return self
        return LayerRouting(self.scores.to(device), self.top_k_index.to(device), self.top_k_weights.to(device))


@dataclass
class _Recorded:
    """What the hooks of one layer saw in the latest pass."""

    router_output: object
    spy: gating.RoutingSpy | None
    selection: tuple[Tensor, Tensor] | None = None
    hidden_states: Tensor | None = None  # only where scores are computed from what the experts got


class _Recorder:
    """Hooks of one layer, and what they saw."""

    def __init__(self, model: nn.Module, block: MoEBlock) -> None:
        self.block = block
        self.widths = (_num_classes(block), block.num_experts)
        # Experts in a plain list are not called with a selection: then the whole block has to be watched.
        self.listed = isinstance(block.storage, ListedExperts)
        self._watched = model.get_submodule(block.experts_name.rpartition(".")[0]) if self.listed else block.router
        self._spy: gating.RoutingSpy | None = None
        self.seen: set[gating.Activation] = set()
        self.activation: gating.Activation | None = None
        self.recorded: _Recorded | None = None

    def hook(self, forget_later: Callable[[int], None]) -> list[RemovableHandle]:
        """Register the hooks; `forget_later` is told when a new pass reaches the layer."""

        def record_router(router: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if not _in_backward():
                forget_later(self.block.layer_idx)
                self.recorded = _Recorded(output, self._spy)

        def record_experts(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.recorded is not None and not _in_backward():
                self.recorded.selection = selection_inputs(args, kwargs)
                if self.block.gate_name is None:
                    self.recorded.hidden_states = next(iter((*args, *kwargs.values())))

        return [
            self._watched.register_forward_pre_hook(self._watch),
            self.block.router.register_forward_hook(record_router),
            self.block.experts.register_forward_pre_hook(record_experts, with_kwargs=True),
            # Also after an error, or the spy would outlive the call.
            self._watched.register_forward_hook(self._end_watch, always_call=True),
        ]

    def _watch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # Which activation it is, is seen once for all. A compiled graph cannot be watched: it is inferred afterwards.
        known = bool(self.seen) and not self.listed
        if not known and not torch.compiler.is_compiling() and not _in_backward():
            self._spy = gating.RoutingSpy(widths=self.widths, keep_tensors=self.listed)
            self._spy.__enter__()

    def _end_watch(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if self._spy is not None:
            self._spy.__exit__(None, None, None)
            self.seen, self._spy = self._spy.seen, None


class RoutingTrace(Mapping[int, LayerRouting]):
    """Routing of the latest forward pass inside `record_routing`, by decoder layer index.

    Scores are computed when a layer is looked up, outside whatever the forward pass was wrapped in, so that gradient
    checkpointing and compilation see the model's own operations only. Lookups after the context has ended give the
    last pass.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[MoEBlock], device: torch.device | None = None) -> None:
        self._device = device
        self._recorders = {block.layer_idx: _Recorder(model, block) for block in blocks}

    def __getitem__(self, layer_idx: int) -> LayerRouting:
        if layer_idx not in self:
            raise KeyError(
                f"no routing of layer {layer_idx} is recorded; recorded are {list(self)} of the layers "
                f"{sorted(self._recorders)}. Run a forward pass inside the context first"
            )
        return _layer_routing(self._recorders[layer_idx]).to(self._device)

    def __contains__(self, layer_idx: object) -> bool:
        return layer_idx in list(self)

    def __iter__(self) -> Iterator[int]:
        return (layer_idx for layer_idx, recorder in sorted(self._recorders.items()) if recorder.recorded is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _hook(self) -> list[RemovableHandle]:
        return [handle for recorder in self._recorders.values() for handle in recorder.hook(self._forget_from)]

    def _forget_from(self, layer_idx: int) -> None:
        """Drop this layer and all later ones: what they hold is of the pass before."""
        for later_idx, recorder in self._recorders.items():
            if later_idx >= layer_idx:
                recorder.recorded = None


@contextmanager
def record_routing(
    model: nn.Module, *, layer_indices: Sequence[int] | None = None, device: torch.device | None = None
) -> Iterator[RoutingTrace]:
    """The routing decisions of the forward passes inside the context, always of the latest one.

    Scores carry gradient where autograd records (with gradient checkpointing: its non-reentrant form; the reentrant
    one records nothing). What a recomputation in the backward pass routes is not recorded a second time.

    Args:
        model: Any model with routed experts, wrapped by PEFT or not.
        layer_indices: Decoder layers to record; None for all with routed experts.
        device: Where lookups give the routing of every layer, for models on several devices; None: where it is.

    Yields:
        A mapping from decoder layer index to `LayerRouting`, empty until a forward pass has run.

    Raises:
        UnsupportedModelError: The model has no routed experts; or, at the lookup of a layer, its router's output
            cannot be understood.
        ValueError: `layer_indices` is empty or names a layer without routed experts.
    """
    blocks = select_blocks(model, layer_indices)
    trace = RoutingTrace(model, blocks, device)
    handles = trace._hook()
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def select_blocks(model: nn.Module, layer_indices: Sequence[int] | None = None) -> list[MoEBlock]:
    """The Mixture-of-Experts blocks of the given decoder layers, ordered; of all layers for None.

    Raises:
        UnsupportedModelError: The model has no routed experts.
        ValueError: `layer_indices` is empty or names a layer without routed experts.
    """
    blocks = find_moe_blocks(model)
    if layer_indices is None:
        return blocks
    known = [block.layer_idx for block in blocks]
    unknown = sorted(set(layer_indices) - set(known))
    if unknown or not layer_indices:
        raise ValueError(
            f"layer_indices={list(layer_indices)}: {type(model).__name__} has routed experts in the layers {known}; "
            "use some of these, or None for all"
        )
    return [block for block in blocks if block.layer_idx in set(layer_indices)]


def selection_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """`top_k_index` and `top_k_weights` among the inputs `(hidden_states, top_k_index, top_k_weights)` of experts."""
    index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
    weights = kwargs.get("top_k_weights", args[2] if len(args) > 2 else None)
    return (index, weights) if isinstance(index, Tensor) and isinstance(weights, Tensor) else None


def _layer_routing(recorder: _Recorder) -> LayerRouting:
    block, recorded = recorder.block, recorder.recorded
    assert recorded is not None
    if recorded.hidden_states is not None and recorded.selection is not None:
        shares: Tensor = cast(Any, block.storage.module).shares(recorded.hidden_states)  # (T, E)
        return LayerRouting(shares, *recorded.selection)
    where = f"layer {block.layer_idx} ({block.router_name}, a {type(unwrap(block.router)).__name__})"
    tensors = gating.router_tensors(recorded.router_output)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    given = [part.reshape(-1, part.shape[-1]) for part in recorded.selection or ()]  # index and weights, (T, K)
    logits = gating.find_logits(tensors, widths=recorder.widths, num_tokens=len(given[0]) if given else None)
    values = None if recorded.spy is None else recorded.spy.values  # (T, E)
    if logits is None and values is None:
        raise gating.no_scores_error(where, f"no logits among outputs of shapes {shapes}")
    selection = given or gating.find_selection(tensors, logits) or gating.watched_selection(recorded.spy)
    if selection is None:
        raise gating.no_scores_error(where, f"no selected experts among outputs of shapes {shapes}")
    index, weights = selection
    if gating.are_marks(index, num_experts=block.num_experts):
        index, weights = gating.from_marks(index, weights)
    if logits is None:
        assert values is not None
        return LayerRouting(gating.sum_to_one(values.reshape(-1, values.shape[-1])), index.long(), weights)
    if recorder.activation is None:
        recorder.activation = gating.find_activation(recorder.seen, logits, index, weights)
    if recorder.activation is None:
        raise gating.no_scores_error(where, "no known activation of its logits is proportional to its weights")
    return LayerRouting(gating.normalised_scores(logits, recorder.activation), index.long(), weights)


def _num_classes(block: MoEBlock) -> int:
    """Number of the router's logits: the experts, and in a few families classes that compute nothing."""
    if block.gate_name is None:
        return block.num_experts
    rows = dict(unwrap(block.router).named_parameters())[block.gate_name].shape[0]
    # A quantised matrix is packed, and its shape says nothing.
    return rows if rows > block.num_experts else block.num_experts


def _in_backward() -> bool:
    """Whether the backward pass is running, and a forward call is therefore a recomputation."""
    return torch._C._current_graph_task_id() != -1
