"""A forget set of several requests in one: split by a column, so that each value gets an adapter of its own."""

from __future__ import annotations

from datasets import ClassLabel, Dataset


def split_by_column(forget_dataset: Dataset, column: str) -> dict[str, Dataset]:
    """The rows of each value of a column, values in the order in which they first appear.

    SPUNGE (https://arxiv.org/abs/2406.11780) splits a forget set by an attribute of its rows, unlearns each part by
    itself and merges the results. Here a part is an adapter, trained on the base, in parallel processes if wanted, and
    `add_weighted_adapter` or `add_regression_mean` makes one of them; or `PromptGate` chooses.

    Args:
        forget_dataset: Any rows.
        column: A column of strings, whole numbers, booleans or class labels.

    Returns:
        By value, as a string, its rows: `{"potions": ..., "towns": ...}`. A class label goes by its name.

    Raises:
        TypeError: It is no `datasets.Dataset`, such as one that is streamed.
        ValueError: There are no rows; or the column is absent, has one value alone, rows without any, or values of
            another type or of several.
    """
    return {value: forget_dataset.select(places) for value, places in places_by_value(forget_dataset, column).items()}


def places_by_value(forget_dataset: Dataset, column: str) -> dict[str, list[int]]:
    """By value, as a string, the places of its rows; arguments and errors as those of :func:`split_by_column`."""
    if not isinstance(forget_dataset, Dataset):
        raise TypeError(f"expected a datasets.Dataset to split, got {type(forget_dataset).__name__}; load it whole")
    if column not in forget_dataset.column_names:
        raise ValueError(f"the forget set has no column {column!r} to split by; it has {forget_dataset.column_names}")
    # This column alone is read, as plain Python values, whatever format the rows are in.
    values = forget_dataset.with_format(None).select_columns(column)[:][column]
    if not values:
        raise ValueError("the forget set has no rows")
    types = sorted({type(value).__name__ for value in values})
    if types not in (["str"], ["int"], ["bool"]):
        raise ValueError(
            f"column {column!r} holds {types}, expected strings, or whole numbers, or booleans, one in every row"
        )
    feature = forget_dataset.features[column]
    names = feature.int2str(values) if isinstance(feature, ClassLabel) else values
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(str(name), []).append(place)
    if len(places) < 2:
        raise ValueError(f"column {column!r} has one value, {[*places]}: there is nothing to split")
    return places
