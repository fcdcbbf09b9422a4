"""Rows of the trainer's data sets -> batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uoe_peft.data import Batch, collate, collate_groups


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
