"""Tokenised examples -> padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uoe_peft.losses import IGNORE_INDEX

Batch = dict[str, Tensor]


def collate(
    examples: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Batch:
    """One padded batch of tokenised examples.

    Args:
        examples: B rows with `input_ids` and, unless every token counts, `labels`.
        pad_token_id: Token id that fills short rows.
        padding_side: "right" or "left".
        pad_to_multiple_of: Round the batch's length S up to a multiple of this.

    Returns:
        `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels` (-100 on padding),
        int64 of shape `(B, S)`, where S is the length of the longest row.

    Raises:
        ValueError: No examples, an unknown `padding_side`, or a row whose labels differ in length.
    """
    if not examples:
        raise ValueError("cannot collate an empty list of examples")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
    multiple = pad_to_multiple_of or 1
    longest = max(len(example["input_ids"]) for example in examples)
    shape = (len(examples), -(-longest // multiple) * multiple)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    for row, example in enumerate(examples):
        ids = example["input_ids"]
        row_labels = example.get("labels", ids)
        if len(row_labels) != len(ids):
            raise ValueError(f"row {row} has {len(ids)} input_ids but {len(row_labels)} labels")
        start = 0 if padding_side == "right" else shape[1] - len(ids)
        window = slice(start, start + len(ids))
        input_ids[row, window] = torch.as_tensor(ids)
        attention_mask[row, window] = 1
        labels[row, window] = torch.as_tensor(row_labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def collate_groups(
    rows: Sequence[Mapping[str, Mapping[str, Any]]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> dict[str, Batch]:
    """One padded batch for each role that the rows hold ("forget", "retain", ...).

    Args:
        rows: B rows of `{role: example}`; every row has the same roles. Of an example is kept, where
            it has them, its `id`, by which what was computed for it once can be found again; its
            `index`, its place in its own set, by which a person finds it; and its `seed`.
        pad_token_id: As in `collate`.
        padding_side: As in `collate`.
        pad_to_multiple_of: As in `collate`.

    Returns:
        `{role: batch}`; a batch is what `collate` returns, and `id`, `index` and `seed`, int64 of shape
        `(B,)`.

    Raises:
        ValueError: As in `collate`.
    """
    if not rows:
        raise ValueError("cannot collate an empty list of examples")
    batches: dict[str, Batch] = {}
    for role in rows[0]:
        examples = [row[role] for row in rows]
        batches[role] = collate(
            examples,
            pad_token_id=pad_token_id,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        for name in ("id", "index", "seed"):
            if name in examples[0]:
                batches[role][name] = torch.tensor([example[name] for example in examples], dtype=torch.int64)
    return batches


@dataclass(frozen=True)
class UnlearningCollator:
    """Pads paired rows (training) role by role, and plain rows (evaluation) as they are.

    Attributes:
        pad_token_id: Token id that fills short rows.
        pad_to_multiple_of: Round a batch's length up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch | dict[str, Batch]:
        """A batch for each role of paired rows, or one batch of plain rows."""
        collating = collate if "input_ids" in rows[0] else collate_groups
        return collating(rows, pad_token_id=self.pad_token_id, pad_to_multiple_of=self.pad_to_multiple_of)
