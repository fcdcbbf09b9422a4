"""A forget set is split by a column: every row goes to its value, and what cannot be split is refused."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from uoe_peft.requests import split_by_column

ROWS = Dataset.from_dict(
    {
        "prompt": ["a", "b", "c", "d", "e"],
        "topic": ["towns", "potions", "towns", "towns", "potions"],
        "year": [3, 1, 3, 2, 2],
        "asked": [True, False, True, True, True],
        "same": ["x"] * 5,
        "score": [0.5, 1.0, 1.5, 2.0, 2.5],
        "lacking": ["x", None, "y", "x", None],
    }
)


@pytest.mark.parametrize(
    ("column", "parts"),
    [
        ("topic", {"towns": "acd", "potions": "be"}),
        ("year", {"3": "ac", "1": "b", "2": "de"}),
        ("asked", {"True": "acde", "False": "b"}),
    ],
)
def test_each_row_is_in_the_part_of_its_value_in_order(column: str, parts: dict[str, str]) -> None:
    found = split_by_column(ROWS, column)
    assert [*found] == [*parts]  # as they first appear
    assert {value: "".join(rows["prompt"]) for value, rows in found.items()} == parts
    assert all(rows.column_names == ROWS.column_names for rows in found.values())


def test_rows_that_were_selected_are_split_as_they_are_seen() -> None:
    found = split_by_column(ROWS.select([4, 2, 1]), "topic")
    assert {value: "".join(rows["prompt"]) for value, rows in found.items()} == {"potions": "eb", "towns": "c"}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("subject", r"no column 'subject' to split by; it has \['prompt', 'topic'"),
        ("same", r"'same' has one value, \['x'\]"),
        ("score", r"'score' holds \['float'\]"),
        ("lacking", r"'lacking' holds \['NoneType', 'str'\]"),
    ],
)
def test_what_cannot_be_split_is_refused(column: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_by_column(ROWS, column)


def test_an_empty_set_is_refused() -> None:
    empty: Any = ROWS.select([])
    with pytest.raises(ValueError, match="has no rows"):
        split_by_column(empty, "topic")


@pytest.mark.parametrize("form", ["numpy", "torch", "arrow"])
def test_the_format_of_the_rows_does_not_matter_and_stays(form: str) -> None:
    rows = ROWS.with_format(form, columns=["year"])
    found = split_by_column(rows, "topic")
    assert {value: len(part) for value, part in found.items()} == {"towns": 3, "potions": 2}
    assert all(part.format == rows.format for part in found.values())


def test_class_labels_go_by_their_names() -> None:
    features = Features({"prompt": Value("string"), "topic": ClassLabel(names=["potions", "towns"])})
    rows = Dataset.from_dict({"prompt": ["a", "b", "c"], "topic": [1, 0, 1]}, features=features)
    assert {value: [*part["prompt"]] for value, part in split_by_column(rows, "topic").items()} == {
        "towns": ["a", "c"],
        "potions": ["b"],
    }


def test_rows_that_are_streamed_are_refused() -> None:
    rows: Any = ROWS.to_iterable_dataset()
    with pytest.raises(TypeError, match=r"got IterableDataset; load it whole"):
        split_by_column(rows, "topic")
