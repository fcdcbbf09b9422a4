"""A forget set of several requests in one: split by a column, so that each value gets an adapter of its own."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


def split_by_column(forget_dataset: Dataset, column: str) -> dict[str, Dataset]:
    """The rows of each value of a column, values in the order in which they first appear.

    SPUNGE (https://arxiv.org/abs/2406.11780) splits a forget set by an attribute of its rows, unlearns each part by
    itself and merges the results. Here a part is an adapter, trained on the base, in parallel processes if wanted, and
    `add_weighted_adapter` or `add_regression_mean` makes one of them; or `PromptGate` chooses.

    Args:
        forget_dataset: Any rows.
        column: A column of strings, whole numbers or booleans.

    Returns:
        By value, as a string, its rows, which name an adapter well: `{"potions": ..., "towns": ...}`.

    Raises:
        ValueError: There are no rows; or the column is absent, has one value alone, rows without any, or values of
            another type.
    """
    if column not in forget_dataset.column_names:
        raise ValueError(f"the forget set has no column {column!r} to split by; it has {forget_dataset.column_names}")
    values = forget_dataset[:][column]
    if not values:
        raise ValueError("the forget set has no rows")
    if wrong := sorted({type(value).__name__ for value in values if not isinstance(value, (str, int))}):
        raise ValueError(f"column {column!r} holds {wrong}, expected a string or a whole number in every row")
    places: dict[Any, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value, []).append(place)
    if len(places) < 2:
        raise ValueError(f"column {column!r} has one value, {[*places]}: there is nothing to split")
    return {str(value): forget_dataset.select(own) for value, own in places.items()}
