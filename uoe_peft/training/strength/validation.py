"""Rows on which strengths are tried: set aside before training, or those that are evaluated anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from uoe_peft.data.tokenization import materialise
from uoe_peft.training.config import UnlearningConfig

# Fewer rows say too little of what is kept, and more than this share would be missed in training.
_FEWEST = 8
_SHARE = 0.1
# So that the draw is not that of the pairs, which has the same seed.
_STREAM = 0x57E9


class NoValidationRows(ValueError):
    """There are no rows to try strengths on."""


def split_retain(retain: Any, args: UnlearningConfig, eval_dataset: Any = None) -> tuple[Any, Any]:
    """A retain set -> what training reads, and what strengths are tried on; None for the latter where nothing is.

    Args:
        retain: The retain set, or None.
        args: Whether and how strength is chosen; the seed.
        eval_dataset: Where it holds retain rows, these are taken, and training reads the whole retain set.

    Raises:
        NoValidationRows: `calibrate` was asked for by name, and there are too few rows.
    """
    if args.calibration_goal is None or _has(eval_dataset, "retain") or retain is None:
        return retain, None
    rows = materialise(retain, name="retain")
    if not args.needs_retain:  # training reads none of it
        return retain, rows.select(drawn(len(rows), args.calibrate_max_rows, seed=args.seed)[0])
    size = min(args.calibrate_max_rows, int(_SHARE * len(rows)))
    if size < min(_FEWEST, args.calibrate_max_rows):
        if args.calibrate == "auto":
            return retain, None
        raise NoValidationRows(
            f"calibrate={args.calibrate!r} sets a tenth of the retain set aside, at least {_FEWEST} rows, and it has "
            f"{len(rows)} rows; pass eval_dataset={{'forget': ..., 'retain': ...}}, or calibrate=False"
        )
    aside, left = drawn(len(rows), size, seed=args.seed)
    return rows.select(left), rows.select(aside)


def validation_rows(
    forget: Dataset, retain: Dataset | None, args: UnlearningConfig, evaluated: Any = None
) -> dict[str, Dataset]:
    """Tokenised rows of both sets, by role, at most `calibrate_max_rows` of each.

    Args:
        forget: The forget set that is trained on.
        retain: The retain rows that were set aside, or None.
        args: How many rows, and the seed.
        evaluated: A dict of tokenised sets takes the place of either.

    Raises:
        NoValidationRows: There are no retain rows, and the goal is to keep them; or one row for relearning.
    """
    sets = {"forget": forget} if retain is None else {"forget": forget, "retain": retain}
    sets |= {role: evaluated[role] for role in ("forget", "retain") if _has(evaluated, role)}
    if "retain" not in sets and args.calibration_goal == "retain":
        raise NoValidationRows(
            "there are too few retain rows to set some aside; pass a larger retain_dataset, or "
            "eval_dataset={'forget': ..., 'retain': ...}"
        )
    limit = args.calibrate_max_rows
    chosen = {role: rows.select(drawn(len(rows), limit, seed=args.seed)[0]) for role, rows in sets.items()}
    if args.calibrate_against == "relearning" and len(chosen["forget"]) < 2:
        raise NoValidationRows("calibrate_against='relearning' needs two forget rows: one to learn, one to ask")
    return chosen


def drawn(num_rows: int, size: int, *, seed: int) -> tuple[list[int], list[int]]:
    """So many of a set's row numbers, and the others; both ascending."""
    order = np.random.default_rng((seed, _STREAM)).permutation(num_rows)
    return np.sort(order[:size]).tolist(), np.sort(order[size:]).tolist()


def _has(sets: Any, role: str) -> bool:
    return isinstance(sets, Mapping) and role in sets
