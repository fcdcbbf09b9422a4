"""Other experts than the unlearned model would choose: the base's, all but the edited ones, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from operator import index
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Cache

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.evaluation.attacks.copies import AdapterScale, edited_experts
from uoe_peft.evaluation.attacks.result import AttackResult, CausalLM, Score, Scores, baseline, measured
from uoe_peft.moe import MoEBlock, find_moe_blocks
from uoe_peft.moe.interventions import silence_expert

Pairs = Sequence[tuple[int, int]]


def expert_forcing(
    model: CausalLM, *, score: Score, base: CausalLM | None = None, before: Scores | None = None
) -> AttackResult:
    """Routes every token as the base model would: was the knowledge only moved out of the router's way?

    Forgetting on a MoE often moves tokens away from the experts that hold the knowledge ("expert selection shift",
    https://arxiv.org/abs/2411.18797), and leaves it there. In each forward pass the base runs first, on the same
    tokens, and what its routers returned is put in the place of what the model's own return: selection and weights.

    Args:
        model: Any MoE model.
        score: Measures forget and retain; its `generate` calls must not reorder their cache, as beam search does.
        base: The model before it forgot, of the same architecture; None: `model` with its adapter off.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        After: scores under the base's routing.

    Raises:
        NotApplicableError: There is neither a `base` nor an adapter that is a scaled sum.
        UnsupportedModelError: The model has no routed experts, or a router is not called as a module.
        ValueError: `base` has routers elsewhere; the adapter is merged or switched off; a pass starts from a cache that
            it did not fill; or a score is not finite.
    """
    replay = _Replay(model, base)
    start = baseline(score, model, before)
    with replay.active():
        after = measured(score, model)
    settings = {"routing_of": "the model with its adapter off" if base is None else type(base).__name__}
    return AttackResult("expert_forcing", before=start, after=after, settings=settings)


def silenced_expert(
    model: CausalLM, *, score: Score, experts: Pairs | None = None, before: Scores | None = None
) -> AttackResult:
    """Lets experts contribute zero: does the damage sit in the edited expert, and the rest answer without it?

    Args:
        model: Any MoE model.
        score: Measures forget and retain.
        experts: `(layer_idx, expert_idx)` pairs; None: those that the model's UOE adapter edits.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        After: scores without the experts.

    Raises:
        NotApplicableError: There are neither `experts` nor a UOE adapter.
        UnsupportedModelError: The model has no routed experts.
        ValueError: `experts` is empty or names one that the model lacks; or a score is not finite.
    """
    given = edited_experts(model, attack="silenced_expert without experts") if experts is None else experts
    pairs = [(index(layer_idx), index(expert_idx)) for layer_idx, expert_idx in given]
    if not pairs:
        raise ValueError("experts is empty; name at least one (layer_idx, expert_idx) pair")
    start = baseline(score, model, before)
    with _silenced(model, pairs):
        after = measured(score, model)
    settings = {"experts": [list(pair) for pair in pairs]}
    return AttackResult("silenced_expert", before=start, after=after, settings=settings)


def shared_path(model: CausalLM, *, score: Score, before: Scores | None = None) -> AttackResult:
    """Lets all routed experts contribute zero: what do attention and shared experts still say?

    Of a model without shared experts attention alone is left.

    Args:
        model: Any MoE model.
        score: Measures forget and retain.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        After: scores of the shared path.

    Raises:
        UnsupportedModelError: The model has no routed experts.
        ValueError: A score is not finite.
    """
    blocks = find_moe_blocks(model)
    start = baseline(score, model, before)
    with _silenced(model, [(block.layer_idx, e) for block in blocks for e in range(block.num_experts)]):
        after = measured(score, model)
    return AttackResult("shared_path", before=start, after=after)


@contextmanager
def _silenced(model: CausalLM, pairs: Pairs) -> Iterator[None]:
    blocks = {block.layer_idx: block for block in find_moe_blocks(model)}
    unknown = sorted({layer_idx for layer_idx, _ in pairs} - set(blocks))
    if unknown:
        raise ValueError(f"experts names the layers {unknown}; routed experts are in the layers {sorted(blocks)}")
    with ExitStack() as stack:
        for layer_idx, expert_idx in pairs:
            stack.enter_context(silence_expert(blocks[layer_idx], expert_idx))
        yield


class _Replay:
    """Has each pass of a model preceded by one of the base, and routed like it."""

    def __init__(self, model: CausalLM, base: CausalLM | None) -> None:
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._base = self._model if base is None else base
        if base is None:
            scale = AdapterScale.of(model, attack="expert_forcing without a base")
            self._as_base: Callable[[], AbstractContextManager[None]] = partial(scale.times, 0.0)
        else:
            self._as_base = nullcontext
            _check_apart(model, base)
        self._in_base = False
        self._outputs: dict[int, Any] = {}  # what the base's routers returned in its latest pass
        self._cache: Cache | None = None  # the model's
        self._base_cache: Cache | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the context the model is routed like the base."""
        blocks, base_blocks = find_moe_blocks(self._model), find_moe_blocks(self._base)
        self._layers = {block.layer_idx for block in blocks}
        handles = [self._model.register_forward_pre_hook(self.run_base, with_kwargs=True)]
        handles += [block.router.register_forward_hook(self.record(block)) for block in base_blocks]
        handles += [block.router.register_forward_hook(self.replace(block)) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run_base(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass of the model: the same pass of the base."""
        if self._in_base:
            return
        cache = kwargs.get("past_key_values")
        inputs = kwargs if cache is None else {**kwargs, "past_key_values": self._cache_beside(cache)}
        self._outputs.clear()
        self._in_base = True
        try:
            with torch.no_grad(), self._as_base():
                self._base(*args, **inputs)
        finally:
            self._in_base = False
        silent = sorted(self._layers - set(self._outputs))
        if silent:
            raise UnsupportedModelError(
                f"expert_forcing: the routers of the layers {silent} of {type(self._base).__name__} are not called as "
                "modules, so that what they return cannot be replaced"
            )

    def record(self, block: MoEBlock) -> Callable[..., None]:
        """A hook that keeps what a router of the base returns."""

        def keep(router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._in_base:
                self._outputs[block.layer_idx] = output

        return keep

    def replace(self, block: MoEBlock) -> Callable[..., Any]:
        """A hook that gives this in the place of what the model's router returns."""

        def replaced(router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return None if self._in_base else self._outputs[block.layer_idx]

        return replaced

    def _cache_beside(self, cache: Cache) -> Cache:
        """The base's own cache for the passes that fill the model's."""
        if cache is not self._cache:
            if cache.get_seq_length():
                raise ValueError(
                    f"expert_forcing: a pass starts from a cache of {cache.get_seq_length()} tokens that the base has "
                    "not seen; let the score start from empty caches"
                )
            self._cache, self._base_cache = cache, deepcopy(cache)
        assert self._base_cache is not None
        return self._base_cache


def _check_apart(model: CausalLM, base: CausalLM) -> None:
    """Refuse a base that is a part of the model, or of another architecture."""
    if base in set(model.modules()) or model in set(base.modules()):
        raise ValueError(
            "base is a part of the model, and so has its adapter: leave it out, or pass the model as it was loaded"
        )
    own, other = ([(b.layer_idx, b.num_experts) for b in find_moe_blocks(each)] for each in (model, base))
    if own != other:
        raise ValueError(
            f"base has the (layer, number of experts) {other}, the model {own}; pass the model that it was made from"
        )
