"""Questions with options to choose from, in the columns of MMLU (https://arxiv.org/abs/2009.03300)."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from datasets import Dataset

from uoe_peft.evaluation.suites.suite import LABEL, OPTIONS, QuestionSet, SetRole

logger = logging.getLogger(__name__)


def option_set(
    rows: Dataset, *, name: str = "mmlu", role: SetRole = "retain", by: Sequence[str] = (), question: str = "question"
) -> QuestionSet:
    """A set whose questions show lettered options; a model chooses the letter that it finds most likely.

    Zero-shot, as in the original: the prompt is the question, one option a line, and "Answer:". Letters alone are
    compared, so a model that knows the answer but not the form fails.

    Args:
        rows: Rows with the question; the options as the columns `A`, `B`, ... (MMLU's CSV), or as a list `choices`
            (MMLU and WMDP on the Hub); and `answer`, the place of the right one, or its letter.
        name: What tables call the set.
        role: "retain" for general knowledge; "forget" for what should be gone, such as WMDP.
        by: Columns for whose values there are scores of their own, such as `("subject",)`.
        question: Column of the question.

    Raises:
        ValueError: A column is missing, a row has fewer than two options, or an answer is none of them.
    """
    ready = [_as_row(row, place, name, question) for place, row in enumerate(rows)]
    return QuestionSet(name, Dataset.from_list(ready), role, by=tuple(by))


def load_option_files(folder: str | PathLike[str]) -> Dataset:
    """MMLU's CSV files of a folder as one set, with the column `subject` from their names.

    Rows that are no valid CSV are left out, and their number is logged.

    Args:
        folder: Holds files such as `astronomy_test.csv` with the columns `question,A,B,C,D,answer`.

    Raises:
        ValueError: There are no CSV files.
    """
    paths = sorted(Path(folder).glob("*.csv"))
    if not paths:
        raise ValueError(f"{folder} has no CSV files; expected MMLU's, such as astronomy_test.csv")
    rows: list[dict[Any, Any]] = []
    for path in paths:
        # Not by `load_dataset`: options such as "None" or "1" are text here, and stay so.
        with path.open(encoding="utf-8", newline="") as file:
            subject = path.stem.rpartition("_")[0] or path.stem
            rows += [{**row, "subject": subject} for row in csv.DictReader(file)]
    # Some copies of MMLU have quotes inside quotes: such a row falls into more fields than there are columns.
    whole = [row for row in rows if None not in row and None not in row.values()]
    if len(whole) < len(rows):
        logger.warning("%s: left out %d of %d rows, which are no valid CSV", folder, len(rows) - len(whole), len(rows))
    return Dataset.from_list(whole)


def _as_row(row: Mapping[str, Any], place: int, name: str, question: str) -> dict[str, Any]:
    letters = [letter for letter in ascii_uppercase if letter in row]
    shown = list(row["choices"]) if "choices" in row else [row[letter] for letter in letters]
    if question not in row or "answer" not in row or len(shown) < 2:
        raise ValueError(
            f"row {place} of set {name!r} needs {question!r}, 'answer' and two options or more, as 'choices' or as "
            f"columns 'A', 'B', ...; it has {sorted(row)}"
        )
    label = _label(row["answer"], len(shown), where=f"row {place} of set {name!r}")
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, shown, strict=False)]
    own = {column for column in row if column in (*letters, "choices", "answer", question)}
    others = {column: value for column, value in row.items() if column not in own}
    return {
        **others,
        "prompt": "\n".join([str(row[question]), *lines, "Answer:"]),
        OPTIONS: [f" {letter}" for letter in ascii_uppercase[: len(shown)]],
        LABEL: label,
    }


def _label(answer: Any, num_options: int, *, where: str) -> int:
    text = str(answer).strip()
    label = ascii_uppercase.find(text) if len(text) == 1 and text.isalpha() else int(text) if text.isdigit() else -1
    if not 0 <= label < num_options:
        raise ValueError(f"{where}: answer must be 0 to {num_options - 1} or its letter, got {answer!r}")
    return label
