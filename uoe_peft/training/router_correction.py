"""Routing of retain tokens, kept after unlearning: routers above the edited layer, corrected in closed form (GRIP).

Unlearning changes what an edited layer writes, so routers above it read other hidden states than before and send retain
tokens elsewhere. https://arxiv.org/abs/2601.16905 corrects each of them by least squares, without training.

Letters: T tokens of a batch, padding included, N real tokens, E rows of a router's matrix, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor

from uoe_peft.attribution.sampling import SampleBatches, sample_batches
from uoe_peft.data import Batch
from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.moe import MoEBlock, plain, unwrap
from uoe_peft.moe.comparison import top_k_jaccard
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.interventions import run_until_routed
from uoe_peft.moe.router_inputs import record_router_input
from uoe_peft.moe.routing import record_routing
from uoe_peft.training.objective.reference import Reference
from uoe_peft.tuner import (
    UOEConfig,
    UOELayer,
    UOEModel,
    add_router_correction,
    correctable_blocks,
    remove_router_correction,
)

logger = logging.getLogger(__name__)

Seen = TypeVar("Seen")

_HELD_OUT = 5  # one row of so many is measured on instead of fitted to


@dataclass(frozen=True)
class RoutingKept:
    """How far the routing of one layer is that of the base model, mean over tokens.

    Attributes:
        cosine: Cosine similarity of the router scores, in [0, 1].
        jaccard: Jaccard similarity of the selected experts, in [0, 1].
    """

    cosine: float
    jaccard: float


@dataclass(frozen=True)
class LayerCorrection:
    """What the correction of one router did to retain tokens that it was not fitted to.

    Attributes:
        layer_idx: The decoder layer.
        before: Routing before any router was corrected.
        after: Routing with this router corrected, and those below that were accepted.
        accepted: Whether the adapter keeps the correction.
    """

    layer_idx: int
    before: RoutingKept
    after: RoutingKept
    accepted: bool


@dataclass(frozen=True)
class RouterCorrection:
    """What `correct_routers` did.

    Attributes:
        layers: One entry for each router above the edited layer, in ascending order.
        ridge: See `correct_routers`.
        min_cosine: Likewise.
    """

    layers: tuple[LayerCorrection, ...]
    ridge: float
    min_cosine: float

    @property
    def accepted_layers(self) -> list[int]:
        """Decoder layers whose routers the adapter corrects now."""
        return [layer.layer_idx for layer in self.layers if layer.accepted]

    def summary(self) -> str:
        """A table, one line a layer."""
        rows = [
            f"{layer.layer_idx:5}  {layer.before.cosine:.3f} -> {layer.after.cosine:.3f}    "
            f"{layer.before.jaccard:.3f} -> {layer.after.jaccard:.3f}  "
            + ("corrected" if layer.accepted else f"left as it was: cosine below {self.min_cosine}, or no better")
            for layer in self.layers
        ]
        return "\n".join(["layer  cosine of scores  same experts (Jaccard), on held-out retain tokens", *rows])


def correct_routers(
    model: PeftModel,
    retain_dataset: Dataset | IterableDataset,
    *,
    processing_class: ProcessingClass,
    ridge: float = 1e-3,
    min_cosine: float = 0.95,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    max_length: int | None = 512,
    seed: int = 0,
) -> RouterCorrection:
    """Correct the routers above the edited layer, so that retain tokens go where the base model sends them.

    Layer by layer, lowest first, since each correction changes what enters the next one:

        delta = (Theta X - Theta X~) X~^T (X~ X~^T + lambda I)^-1

    with Theta the router's matrix, X and X~ its inputs on retain tokens with the adapter off and on. As lambda tends to
    0 that is the closed form of https://arxiv.org/abs/2601.16905, which pulls the corrected matrix to 0 where this one
    pulls the delta to 0: where the adapter changes nothing, nothing is corrected. Biases stay as they are.

    Costs a few passes over the sample for each router, up to that router; memory does not grow with the sample.

    The deltas become part of the model's active adapter, which is saved, merged and switched as before; they are not
    trained, and out of date once the adapter is trained on. Corrections that the adapter has are computed anew.

    Forget tokens get their old routing back, too, and with it a little of what was forgotten: evaluate again.

    Args:
        model: A model whose active adapter is one of UOE, already trained, not merged.
        retain_dataset: What is to be kept, in any of TRL's dataset types. A fifth of the sample is held out to measure
            on.
        processing_class: Tokenizer, or a processor that holds one.
        ridge: lambda, > 0, as a share of the mean of X~ X~^T's diagonal, so that it means the same for any sample.
        min_cosine: Least mean cosine of the scores with and without the adapter that a corrected router must reach to
            be kept, in [0, 1]; nor may it be lower than without the correction.
        max_tokens: Size of the sample in tokens.
        batch_size: Sequences in a batch.
        max_length: Longest sequence in tokens; None for no limit.
        seed: Of the sample.

    Returns:
        Routing before and after, and which layers were corrected.

    Raises:
        ValueError: The active adapter is not one of UOE, or there are several; it is merged or disabled; no router
            above its lowest target layer is left to correct; a number is out of range; the set has fewer than two rows
            or cannot be used; hidden states are not finite.
        UnsupportedModelError: The model is an encoder-decoder, or its routers cannot be watched.
    """
    if not ridge > 0 or not 0 <= min_cosine <= 1:
        raise ValueError(f"ridge must be > 0 and min_cosine in [0, 1], got {ridge} and {min_cosine}")
    tuner, adapter_name = _tuner_and_adapter(model)
    blocks = correctable_blocks(tuner, adapter_name)
    if not blocks:
        raise ValueError(
            f"adapter {adapter_name!r} leaves no router to correct: expected a layer with routed experts above its "
            "lowest target layer whose router it does not train"
        )
    sample = sample_batches(
        retain_dataset,
        processing_class,
        max_tokens=max_tokens,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        name="retain",
    )
    fitted, held_out = _split(sample)
    layers = []
    with _all_or_as_before(tuner, adapter_name):
        before = routing_kept(model, held_out, [block.layer_idx for block in blocks])
        for block in blocks:
            layer_idx = block.layer_idx
            without = routing_kept(model, held_out, [layer_idx])[layer_idx].cosine
            add_router_correction(tuner, adapter_name, layer_idx, router_delta(model, block, fitted, ridge=ridge))
            after = routing_kept(model, held_out, [layer_idx])[layer_idx]
            accepted = after.cosine >= max(min_cosine, without)
            layers.append(LayerCorrection(layer_idx, before[layer_idx], after, accepted))
            if not accepted:
                remove_router_correction(tuner, adapter_name, layer_idx)
    correction = RouterCorrection(tuple(layers), ridge, min_cosine)
    logger.info("routers above the edited layer\n%s", correction.summary())
    return correction


def router_delta(model: PeftModel, block: MoEBlock, batches: Iterable[Batch], *, ridge: float) -> Tensor:
    """The delta of one router that restores its logits on the batches' tokens best; see `correct_routers`.

    Args:
        model: The model; its active adapter has no delta of this router.
        block: The router's block.
        batches: Retain tokens, padding left out.
        ridge: See `correct_routers`.

    Returns:
        Shape `(E, H)`, float64.

    Raises:
        ValueError: Hidden states are not finite.
        UnsupportedModelError: See `correct_routers`.
    """
    gate = plain(unwrap(block.router).get_parameter(block.gate_name)).detach().double()  # (E, H)
    gram = gate.new_zeros(gate.shape[1], gate.shape[1])
    moved = torch.zeros_like(gate)
    with record_router_input(block) as router_input:
        for mask, edited, original in _compare(model, batches, block.layer_idx, router_input):
            counted = mask.to(edited.device)  # layers may lie on several devices
            inputs = edited[counted].double()  # (N, H)
            difference = original[counted].double() - inputs  # (N, H)
            gram += inputs.T @ inputs
            moved += (difference @ gate.T).T @ inputs  # (E, N) x (N, H): nothing grows with the number of tokens
    if not (gram.isfinite().all() and moved.isfinite().all()):
        raise ValueError(f"the inputs of {block.router_name} are NaN or infinite; check the adapter and the dtype")
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, moved, left=False)


def routing_kept(model: PeftModel, batches: Iterable[Batch], layer_indices: Sequence[int]) -> dict[int, RoutingKept]:
    """How far routing is that of the base model, by decoder layer.

    Args:
        model: The model, with its adapter on.
        batches: Tokens to route, padding left out.
        layer_indices: Decoder layers with routed experts, in ascending order.

    Raises:
        UnsupportedModelError: See `correct_routers`.
    """
    totals = {layer_idx: torch.zeros(2, dtype=torch.float64) for layer_idx in layer_indices}
    num_tokens = 0
    with record_routing(model, layer_indices=layer_indices) as trace:
        for mask, edited, original in _compare(model, batches, layer_indices[-1], lambda: dict(trace)):
            counted = int(mask.sum())
            num_tokens += counted
            for layer_idx, total in totals.items():
                now, base = edited[layer_idx], original[layer_idx]
                cosine = torch.cosine_similarity(now.scores, base.scores)[mask.to(now.scores.device)].mean()
                jaccard = top_k_jaccard(now.top_k_index, base.top_k_index, num_experts=now.scores.shape[-1], mask=mask)
                total += counted * torch.stack([cosine, jaccard]).double().cpu()
    return {layer_idx: RoutingKept(*(total / num_tokens).tolist()) for layer_idx, total in totals.items()}


def _compare(
    model: PeftModel, batches: Iterable[Batch], layer_idx: int, read: Callable[[], Seen]
) -> Iterator[tuple[Tensor, Seen, Seen]]:
    """Which tokens count, shape `(T,)`, and what `read` sees of each batch with the adapter on and off."""
    reference = Reference(model)
    with run_until_routed(model, layer_idx) as run:
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            with evaluation_mode(model):
                run(**inputs)
                edited = read()
            with reference.base_model():
                run(**inputs)
                original = read()
            yield inputs["attention_mask"].flatten().bool(), edited, original


@contextmanager
def _all_or_as_before(tuner: UOEModel, adapter_name: str) -> Iterator[None]:
    """Inside the context an adapter begins without corrections; after an error it has those that it had."""
    config = cast(UOEConfig, tuner.peft_config[adapter_name])
    routers = {block.layer_idx: block.router for block in correctable_blocks(tuner, adapter_name)}
    before = {}
    for layer_idx in config.corrected_router_layers or ():
        layer = cast(UOELayer, routers[layer_idx])
        (projection,) = cast(Any, layer.uoe_delta[adapter_name]).keys()
        before[layer_idx] = layer.get_delta_weight(adapter_name, projection, layer.target_indices[adapter_name][0])
        remove_router_correction(tuner, adapter_name, layer_idx)
    try:
        yield
    except BaseException:
        for layer_idx in config.corrected_router_layers or ():
            remove_router_correction(tuner, adapter_name, layer_idx)
        for layer_idx, delta in before.items():
            add_router_correction(tuner, adapter_name, layer_idx, delta)
        raise


def _tuner_and_adapter(model: PeftModel) -> tuple[UOEModel, str]:
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, UOEModel) or len(model.active_adapters) != 1:
        found = f"a {type(tuner).__name__} with the active adapters {getattr(model, 'active_adapters', [])}"
        raise ValueError(f"correct_routers needs a PeftModel with one active UOE adapter, got {found}")
    layers = [layer for layer in model.modules() if isinstance(layer, UOELayer)]
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise ValueError(
            "the adapter is merged or disabled, so that its effect cannot be seen; call unmerge_adapter() or "
            "enable_adapter_layers() first"
        )
    return tuner, model.active_adapters[0]


def _split(sample: SampleBatches) -> tuple[SampleBatches, SampleBatches]:
    """Rows to fit to, and rows to measure on."""
    rows = list(sample.examples)
    if len(rows) < 2:
        raise ValueError("the retain set has one row; expected at least two, of which one is held out to measure on")
    fitted = [row for place, row in enumerate(rows) if place % _HELD_OUT]
    return replace(sample, examples=fitted), replace(sample, examples=rows[::_HELD_OUT])
