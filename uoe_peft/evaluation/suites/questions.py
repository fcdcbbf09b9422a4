"""Question sets in the columns of RWKU (https://arxiv.org/abs/2406.10890) and MUSE (https://arxiv.org/abs/2407.06460).

Both ask for an answer and compare words: RWKU by cloze ("level 1"), by question (2) and under adversarial prompts (3),
of the forgotten subject and of its neighbours; MUSE verbatim continuation, and knowledge of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from uoe_peft.evaluation.suites.suite import QuestionSet, SetRole, Suite


def rwku_suite(
    forget: Mapping[str, Dataset],
    neighbor: Mapping[str, Dataset],
    *,
    prompt: Callable[[str], Any] = "{}".format,
    completion: Callable[[str], Any] = " {}".format,
) -> Suite:
    """RWKU's sets: rows with `query` and `answer`; `subject`, `level` and `type` give scores by value.

    Args:
        forget: What should be gone, by name, such as `{"forget_level1": ..., "forget_level3": ...}`.
        neighbor: What should still be known, such as `{"neighbor_level1": ...}`.
        prompt: Makes a prompt of a query: a string, or a list of messages for a chat model.
        completion: Makes a completion of an answer, of the same kind.

    Raises:
        ValueError: A set lacks a column, or there is none of a role.
    """
    return _suite("RWKU", forget, neighbor, "query", prompt=prompt, completion=completion)


def muse_suite(
    forget: Mapping[str, Dataset],
    retain: Mapping[str, Dataset],
    holdout: Mapping[str, Dataset] | None = None,
    *,
    prompt: Callable[[str], Any] = "{}".format,
    completion: Callable[[str], Any] = " {}".format,
) -> Suite:
    """MUSE's sets: rows with `question` (knowledge) or `prompt` (verbatim), and `answer` or `gt`; or `text` (privacy).

    Args:
        forget: Such as `{"verbmem": ..., "knowmem": ..., "privleak_forget": ...}`.
        retain: Such as `{"knowmem_retain": ...}`.
        holdout: Texts of the forget set's kind that no model was taught, such as `{"privleak_holdout": ...}`.
        prompt: Makes a prompt of a question or of a beginning.
        completion: Makes a completion of an answer or of an end.

    Raises:
        ValueError: A set lacks a column, or there is none of a role.
    """
    return _suite("MUSE", forget, retain, "question", holdout or {}, prompt=prompt, completion=completion)


def _suite(
    name: str,
    forget: Mapping[str, Dataset],
    retain: Mapping[str, Dataset],
    asks: str,
    holdout: Mapping[str, Dataset] | None = None,
    *,
    prompt: Callable[[str], Any],
    completion: Callable[[str], Any],
) -> Suite:
    given: dict[SetRole, Mapping[str, Dataset]] = {"forget": forget, "retain": retain, "holdout": holdout or {}}
    sets = []
    for role, parts in given.items():
        for part, rows in parts.items():
            ready = _with_prompts(rows, part, asks, prompt=prompt, completion=completion)
            by = tuple(column for column in ("subject", "level", "type") if column in ready.column_names)
            sets.append(QuestionSet(part, ready, role, by=by, utility=role == "retain"))
    return Suite(name, tuple(sets))


def _with_prompts(
    rows: Dataset, name: str, asks: str, *, prompt: Callable[[str], Any], completion: Callable[[str], Any]
) -> Dataset:
    columns = rows.column_names
    question = next((column for column in (asks, "prompt") if column in columns), None)
    answer = next((column for column in ("answer", "gt") if column in columns), None)
    if question is None and "text" in columns:
        return rows
    if question is None or answer is None:
        raise ValueError(f"set {name!r} needs {asks!r} or 'prompt', and 'answer' or 'gt'; it has {sorted(columns)}")

    def ready(row: Mapping[str, Any]) -> dict[str, Any]:
        others = {column: value for column, value in row.items() if column not in (question, answer)}
        return {**others, "prompt": prompt(row[question]), "completion": completion(row[answer])}

    return Dataset.from_list([ready(row) for row in rows])
