"""What the reference says, kept on disk beside the prefix cache: it is the same in every epoch, run, seed and loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from uoe_peft.data import Batch
from uoe_peft.losses import answer_positions
from uoe_peft.training.objective.reference import Need, Reference
from uoe_peft.training.reuse.store import StateFolder, StateStore, open_store, write_store
from uoe_peft.training.reuse.store_key import store_key

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


def keep_reference(
    reference: Reference,
    rows: Sequence[Row],
    *,
    need: Need,
    folder: StateFolder,
    weights: Callable[[], str],
    batches: Callable[[Sequence[Row]], Iterable[Batch]],
) -> None:
    """Give a reference what it needs of some rows: found where an earlier run left it, or computed and written now.

    Hidden states stay on disk, memory-mapped, and are those of answer tokens alone.

    Args:
        reference: Takes the values.
        rows: Examples with `input_ids`, `labels` and `id`; those of one `id` are asked about once.
        need: Likelihoods or hidden states.
        folder: Where they are kept.
        weights: What the reference's answers depend on, see `weights_key`; not asked in a fresh folder.
        batches: Makes batches of rows, on the model's device.

    Raises:
        PrefixCacheUnavailable: The disk has no room.
    """
    unique = {row["id"]: row for row in rows}
    layer_idx = reference.hidden_layer if need == "hidden" else None
    key = store_key("" if folder.is_fresh else weights(), need, layer_idx, *sorted(unique))

    def compute() -> StateStore:
        logger.info("asking the reference about %d examples: %s", len(unique), need)
        with reference.before_training():
            values = chain.from_iterable(reference.compute(need, batch) for batch in batches([*unique.values()]))
            first = next(values)  # it shows of what dtype and size they are
            states = zip(map(str, unique), chain([first], values), strict=True)
            num_tokens = sum(1 if need == "nll" else _num_answer_tokens(row) for row in unique.values())
            return write_store(folder.path, key, states, num_tokens=num_tokens, row=first[0])

    store = folder.in_turn(lambda: open_store(folder.path, key) or compute())
    reference.remember(need, {example: cast(Tensor, store.states(str(example))) for example in unique})


def _num_answer_tokens(row: Row) -> int:
    return int(answer_positions(torch.tensor([row["labels"]])).sum())
