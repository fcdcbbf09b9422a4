"""What enters the lowest edited layer, computed once for each example: training then starts at that layer.

An adapter changes nothing below the first layer that it edits, so every step, epoch, loss and seed sees the same hidden
states there. Whether a model gives the same results when it starts at that layer is measured on the model itself and on
two of its rows, see :mod:`uoe_peft.moe.segments`.

Letters: B batch, S sequence, H hidden size.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from uoe_peft.data import Batch, collate
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.exactness import fill_padding, relative_difference, tolerance
from uoe_peft.moe.passes import run_passes
from uoe_peft.moe.segments import LayerState, find_layers, run_from_layer, run_until_layer
from uoe_peft.training.reuse.edited import lowest_edited_layer
from uoe_peft.training.reuse.store import (
    PrefixCacheUnavailable,
    StateFolder,
    StateStore,
    open_store,
    sequence_digest,
    write_store,
)
from uoe_peft.training.reuse.store_key import all_weights, store_key, weights_key

logger = logging.getLogger(__name__)

# Inputs that what enters a layer depends on, and inputs that it does not depend on. Anything else: the full forward.
_INPUTS = frozenset({"input_ids", "attention_mask"})
_IRRELEVANT = frozenset({"labels", "logits_to_keep", "use_cache", "return_dict", "fused_lm_head"})


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """Hidden states that enter a decoder layer, for many token sequences.

    Attributes:
        layers: The model's decoder layers.
        layer_idx: The layer that they enter.
        store: Where they are.
        tuple_length: Length of the tuple that the layer below returns; None where it returns the states alone.
    """

    layers: nn.Module
    layer_idx: int
    store: StateStore
    tuple_length: int | None

    @contextmanager
    def serve(self, model: nn.Module) -> Iterator[None]:
        """Inside the context forward passes of `model` start at the layer, if all sequences of their batch are here.

        Others run in full, so that the results are the same either way.
        """
        with ExitStack() as current:

            def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                state = None if args else self.state(kwargs)
                if state is not None:
                    current.enter_context(run_from_layer(self.layers, self.layer_idx, state))

            def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                current.close()

            handles = (
                model.register_forward_pre_hook(enter, with_kwargs=True),
                model.register_forward_hook(leave, always_call=True),
            )
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def state(self, inputs: dict[str, Any]) -> LayerState | None:
        """What enters the layer, padded as the batch is; None where a sequence is unknown or other inputs matter."""
        given = {name for name, value in inputs.items() if value is not None and value is not False}
        if not _INPUTS <= given <= _INPUTS | _IRRELEVANT:
            return None
        hidden = self._hidden(inputs["input_ids"], inputs["attention_mask"])
        if hidden is None or self.tuple_length is None:
            return hidden
        return (hidden, *(None for _ in range(self.tuple_length - 1)))

    def missing(self, batch: Mapping[str, Tensor]) -> list[int]:
        """Rows of a batch whose sequences are not here."""
        found, _ = self._rows(batch["input_ids"], batch["attention_mask"])
        return [row for row, states in enumerate(found) if states is None]

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        rows, mask = self._rows(input_ids, attention_mask)
        if any(row is None for row in rows):
            return None
        flat = torch.cat(cast(list[Tensor], rows))
        hidden = flat.new_zeros(*mask.shape, *flat.shape[1:])
        hidden[mask] = flat
        return fill_padding(hidden.to(input_ids.device), attention_mask)

    def _rows(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """States of each row, and the mask on the CPU."""
        # One wait for the device: the sequences are looked up by their tokens, so that none can be mistaken.
        ids, mask = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu()
        mask = mask.bool()
        return [self.store.states(sequence_digest(row[kept])) for row, kept in zip(ids, mask, strict=True)], mask


@dataclass(frozen=True)
class PrefixSource:
    """How states are computed.

    Attributes:
        model: The model.
        batch_size: Sequences in a forward pass.
        pad_token_id: Token id that fills short rows.
        place: Moves a batch to the model's device.
        context: Makes the context of a forward pass, such as autocast.
    """

    model: nn.Module
    batch_size: int
    pad_token_id: int
    place: Callable[[Batch], Batch]
    context: Callable[[], Any]

    def batch(self, sequences: Sequence[Sequence[int]]) -> Batch:
        """A batch of sequences on the model's device, without labels."""
        padded = collate([{"input_ids": ids} for ids in sequences], pad_token_id=self.pad_token_id)
        return self.place({name: padded[name] for name in ("input_ids", "attention_mask")})

    def state(self, layer_idx: int, batch: Batch) -> LayerState:
        """What enters a layer."""
        with torch.no_grad(), self.context():
            return run_until_layer(self.model, layer_idx, batch)


@contextmanager
def prefix_cache(
    source: PrefixSource,
    sequences: Iterable[Sequence[int]],
    *,
    folder: StateFolder | None = None,
) -> Iterator[PrefixCache]:
    """A cache of what enters the lowest edited layer, computed now or found where an earlier run left it.

    Args:
        source: The model, and how to run it.
        sequences: Token ids that training will see; each is computed once, however often it is there.
        folder: Where the cache is kept. None: a temporary folder that is removed at the end of the context.

    Raises:
        PrefixCacheUnavailable: Nothing is below the lowest edited layer, or something below it changes in training;
            the model gives other results when it starts there; or the disk has no room.
    """
    layer_idx = lowest_edited_layer(source.model)
    unique = sorted({sequence_digest(ids): ids for ids in sequences}.items(), key=lambda item: -len(item[1]))
    # The longest row and the shortest: padding is tried, too, at the cost of two rows instead of a whole batch.
    batch = source.batch([ids for _, ids in unique[:1] + unique[1:][-1:]])
    with temporary_folder() if folder is None else nullcontext(folder) as place:
        # A fresh folder holds nothing that could be stale, and weights take long to read.
        key = "states" if place.is_fresh else cache_key(source, layer_idx, [digest for digest, _ in unique])

        def find_or_compute() -> PrefixCache:
            state = _check(source, layer_idx, batch)
            row = _hidden_states(state)[0, 0]
            store = open_store(place.path, key) or _compute(source, layer_idx, unique, place.path, key, row)
            tuple_length = len(state) if isinstance(state, tuple) else None
            return PrefixCache(find_layers(source.model), layer_idx, store, tuple_length)

        cache = place.in_turn(find_or_compute)
        logger.info("training starts at decoder layer %d, for %d sequences", layer_idx, len(unique))
        yield cache


@contextmanager
def temporary_folder() -> Iterator[StateFolder]:
    """A folder that is removed at the end of the context."""
    with tempfile.TemporaryDirectory(prefix="uoe-prefix-", ignore_cleanup_errors=True) as path:
        yield StateFolder(Path(path), is_fresh=True)


def cache_key(source: PrefixSource, layer_idx: int, digests: Iterable[str]) -> str:
    """A name that changes with whatever states depend on: weights, configuration, versions, layer and tokens.

    Reads every weight below the layer, at about the speed of the disk.
    """
    layers = find_layers(source.model)
    above = {id(t) for name, layer in layers.named_children() if int(name) >= layer_idx for t in all_weights(layer)}
    below = (tensor for tensor in all_weights(source.model) if id(tensor) not in above)
    return store_key(weights_key(source.model, below, context=source.context), layer_idx, *sorted(digests))


def _check(source: PrefixSource, layer_idx: int, batch: Batch) -> LayerState:
    """What enters the layer, if a model that starts there gives the results of the whole model, in training, too."""
    model = source.model
    with evaluation_mode(model), source.context():
        state = run_until_layer(model, layer_idx, batch)
        difference, rounding = relative_difference(model, batch, layer_idx), tolerance(model)
    name = type(model).__name__
    if isinstance(state, tuple) and any(part is not None for part in state[1:]):
        raise PrefixCacheUnavailable(f"layers of {name} hand on more than hidden states, which is not kept")
    if difference > rounding:
        raise PrefixCacheUnavailable(
            f"{name} gives other results when it starts at layer {layer_idx}: they differ by {difference:.1e} of "
            "their standard deviation"
        )
    # The Trainer turns training mode on after this.
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            _check_noiseless(source, layer_idx, batch, state, rounding)
    finally:
        model.train(was_training)
    return state


def _check_noiseless(source: PrefixSource, layer_idx: int, batch: Batch, state: LayerState, rounding: float) -> None:
    mask = batch["attention_mask"].to(_hidden_states(state).device).bool()
    expected = _hidden_states(state)[mask].float()
    found = _hidden_states(source.state(layer_idx, batch))[mask].float()
    if (found - expected).square().mean().sqrt() > rounding * expected.std():
        raise PrefixCacheUnavailable(
            f"{type(source.model).__name__} has dropout or noise below layer {layer_idx}, which a cache cannot repeat"
        )


def _compute(
    source: PrefixSource,
    layer_idx: int,
    sequences: list[tuple[str, Sequence[int]]],
    folder: Path,
    key: str,
    row: Tensor,
) -> StateStore:
    def states() -> Iterator[tuple[str, Tensor]]:
        starts = range(0, len(sequences), source.batch_size)
        chunks = [sequences[start : start + source.batch_size] for start in starts]
        passes = (partial(_state_of, source, layer_idx, chunk) for chunk in chunks)
        for chunk, (state, _) in zip(chunks, run_passes(source.model, passes), strict=True):
            for (digest, ids), values in zip(chunk, _hidden_states(state).cpu(), strict=True):
                yield digest, values[: len(ids)]

    num_tokens = sum(len(ids) for _, ids in sequences)
    with evaluation_mode(source.model):
        return write_store(folder, key, states(), num_tokens=num_tokens, row=row)


def _state_of(source: PrefixSource, layer_idx: int, chunk: Sequence[tuple[str, Sequence[int]]]) -> LayerState:
    return source.state(layer_idx, source.batch([ids for _, ids in chunk]))


def _hidden_states(state: LayerState) -> Tensor:
    return state if isinstance(state, Tensor) else cast(Tensor, state[0])
