"""Alternative answers to the questions of a forget set: "I don't know", or the set's own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from datasets import Dataset

from uoe_peft.data.conversations import CONVERSATION_COLUMNS, answering_turns, read_messages
from uoe_peft.data.tokenization import (
    ProcessingClass,
    TruncationMode,
    answered_rows,
    drop_bookkeeping,
    materialise,
    tokenize_rows,
)

ALTERNATIVE_COLUMN = "alternative"


def load_idk_answers() -> list[str]:
    """Ways to say "I don't know", shipped with the package."""
    text = files("uoe_peft.data").joinpath("idk_answers.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def tokenize_with_alternatives(
    dataset: Dataset,
    processing_class: ProcessingClass,
    *,
    max_length: int | None,
    seed: int,
    completion_only: bool = True,
    truncation_mode: TruncationMode = "keep_start",
    name: str = "forget",
    num_proc: int | None = None,
) -> tuple[Dataset, Dataset]:
    """The forget set, and the same questions with alternative answers, row by row.

    The alternatives are the column "alternative" if there is one, or "chosen" of TRL's preference type ("rejected" is
    then the forget answer); otherwise one of `load_idk_answers`, drawn for each row by `seed`.

    Args:
        dataset: `prompt` and `completion`, or `messages` (or ShareGPT's `conversations`), or `prompt`, `chosen` and
            `rejected`.
        processing_class: As in `tokenize_dataset`.
        max_length: As in `tokenize_dataset`.
        seed: Of the drawn answers.
        completion_only: As in `tokenize_dataset`.
        truncation_mode: As in `tokenize_dataset`.
        name: As in `tokenize_dataset`.
        num_proc: As in `tokenize_dataset`.

    Returns:
        Two sets of equal length; a row of which either is truncated away is in neither.

    Raises:
        ValueError: The set has no question apart from its answer (`text`, `input_ids`), or as in `tokenize_dataset`.
    """
    dataset = materialise(dataset, name=name)
    columns = set(dataset.column_names)
    understood = ({"prompt", "completion"}, {"prompt", "chosen", "rejected"}, *({c} for c in CONVERSATION_COLUMNS))
    if not any(needed <= columns for needed in understood):
        raise ValueError(
            f"alternative answers need questions: the {name} set has the columns {sorted(columns)}; expected 'prompt' "
            "and 'completion', or 'messages', or 'conversations', or 'prompt', 'chosen' and 'rejected'"
        )
    answers = load_idk_answers()
    drawn = np.random.default_rng(seed).integers(len(answers), size=len(dataset))
    pairs = [_split(row, answers[i]) for row, i in zip(dataset, drawn, strict=True)]
    tokenized = [
        tokenize_rows(
            Dataset.from_list(rows),
            processing_class,
            max_length=max_length,
            completion_only=completion_only,
            truncation_mode=truncation_mode,
            name=role,
            num_proc=num_proc,
        )
        for role, rows in ((name, [pair[0] for pair in pairs]), ("alternative", [pair[1] for pair in pairs]))
    ]
    kept = set.intersection(*(set(answered_rows(rows, max_length=max_length, name=name)) for rows in tokenized))
    if not kept:
        raise ValueError(f"nothing is left of the {name} set: no row keeps both its answer and the alternative")
    forget, alternatives = (drop_bookkeeping(rows.select(sorted(kept))) for rows in tokenized)
    return forget, alternatives


def _split(row: Mapping[str, Any], idk: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row as prompt and completion, and with the alternative in place of the completion."""
    extra = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
    if "chosen" in row:
        prompt, answer, alternative = row["prompt"], row["rejected"], row["chosen"]
    elif "prompt" not in row:
        turns = read_messages(next(row[name] for name in CONVERSATION_COLUMNS if row.get(name) is not None))
        last = max(answering_turns(turns), default=len(turns))
        prompt, answer, alternative = turns[:last], turns[last : last + 1], row.get(ALTERNATIVE_COLUMN)
    else:
        prompt, answer, alternative = row["prompt"], row["completion"], row.get(ALTERNATIVE_COLUMN)
    said = idk if alternative is None else alternative
    if isinstance(said, str):
        said = _as_answer(said, like=answer)
    return {"prompt": prompt, "completion": answer, **extra}, {"prompt": prompt, "completion": said, **extra}


def _as_answer(text: str, *, like: Any) -> Any:
    if isinstance(like, str):
        leading = like[: len(like) - len(like.lstrip())]
        return leading + text.lstrip()
    return [{"role": "assistant", "content": text}]
