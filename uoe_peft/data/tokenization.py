"""Forget and retain sets in the types of text that TRL's `SFTTrainer` reads -> token ids and labels.

The rules are those of TRL's `SFTTrainer` (end-of-sequence token, where an answer starts,
truncation), with one difference, said at `tokenize_dataset`: in a conversation only the assistant's
turns are answers. Forgetting the user's words, or the chat template itself, is never what is meant.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from uoe_peft.data.columns import check_columns, check_readable
from uoe_peft.data.encoding import encode_row, example_id, num_predicted

logger = logging.getLogger(__name__)

TruncationMode = Literal["keep_start", "keep_end"]
ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

_NUM_BEFORE = "num_answer_tokens_before_truncation"
_NUM_AFTER = "num_answer_tokens"
_NUM_MISSING = "num_answers_not_rendered"


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    processing_class: ProcessingClass,
    *,
    max_length: int | None,
    completion_only: bool = True,
    name: str = "forget",
    text_field: str = "text",
    truncation_mode: TruncationMode = "keep_start",
    max_examples: int | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Token ids and labels of a data set of text.

    Understood columns, the first match wins: `input_ids` (with `labels`, else `assistant_masks` and
    `completion_mask`, else every token counts; where there is an `attention_mask`, padding is taken
    out); `prompt` and `completion`, both strings or both lists of messages; `messages`, or
    `conversations` as ShareGPT has them; `text`.

    An end-of-sequence token is appended to strings, not to conversations, whose chat template ends
    them. Where TRL would count every token of a `messages` row, only what the assistant says counts
    here, with the end of its turns (`completion_only=False` counts all). What the chat template
    writes before an answer, such as an empty `<think>` block or the name of a channel, is no part of
    it, see :mod:`uoe_peft.data.turns`.

    Rows without an answer, and rows whose answer lies entirely beyond `max_length`, are left out:
    of an empty answer only its end would be forgotten. Their number is logged, as is the number of
    rows whose answer was cut, and of answers that the chat template leaves out.

    Args:
        dataset: The set. A streaming set needs `max_examples`.
        processing_class: Tokenizer, or a processor that holds one.
        max_length: Longest sequence in tokens, at least 2; None for no limit.
        completion_only: Whether prompt tokens get the label -100.
        name: What messages call this set: "forget", "retain", "eval".
        text_field: Column of plain text.
        truncation_mode: Which end of a sequence that is too long is kept.
        max_examples: Read at most so many rows; None for all of them.
        num_proc: Processes that share the work; None for this one alone.

    Returns:
        Columns `input_ids` and `labels`, lists of int of equal length per row; `labels` is -100
        where a token does not count. And `id`, by which an example can be found again, see
        :func:`uoe_peft.data.encoding.example_id`.

    Raises:
        TypeError: `dataset` is not a `Dataset` or `IterableDataset`.
        ValueError: The set is empty, has no usable columns, streams without `max_examples`, is
            conversational while there is no chat template, holds images or other things than text,
            is of another of TRL's types (preference, prompt-only, stepwise supervision), is transformed
            when it is read, or all its answers are truncated away; `max_length` or
            `max_examples` is too small.
    """
    rows = tokenize_rows(
        materialise(dataset, max_examples=max_examples, name=name),
        processing_class,
        max_length=max_length,
        completion_only=completion_only,
        name=name,
        text_field=text_field,
        truncation_mode=truncation_mode,
        num_proc=num_proc,
    )
    kept = answered_rows(rows, max_length=max_length, name=name)
    return drop_bookkeeping(rows if len(kept) == len(rows) else rows.select(kept))


def materialise(
    dataset: Dataset | IterableDataset, *, max_examples: int | None = None, name: str = "forget"
) -> Dataset:
    """The set as a `Dataset` of at least one row, which can be indexed.

    Raises:
        TypeError: `dataset` is neither a `Dataset` nor an `IterableDataset`.
        ValueError: It is empty, or streams and `max_examples` is None, or `max_examples` < 1; or it
            holds images, or is transformed when it is read.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1 or None, got {max_examples}")
    match dataset:
        case Dataset():
            if max_examples is not None and len(dataset) > max_examples:
                dataset = dataset.select(range(max_examples))
        case IterableDataset():
            if max_examples is None:
                raise ValueError(
                    f"the {name} set is a streaming IterableDataset of unknown length; say how "
                    "many rows to read, e.g. Dataset.from_list(list(dataset.take(1000)))"
                )
            dataset = Dataset.from_list(list(dataset.take(max_examples)))
        case DatasetDict() | IterableDatasetDict():
            raise TypeError(
                f"the {name} set is a {type(dataset).__name__} with the splits {sorted(dataset)}; "
                f'pass one split, e.g. dataset["{next(iter(dataset), "train")}"]'
            )
        case _:
            raise TypeError(
                f"the {name} set must be a datasets.Dataset or IterableDataset, got "
                f"{type(dataset).__name__}; datasets.Dataset.from_list makes one of a list of dicts"
            )
    if len(dataset) == 0:
        raise ValueError(f"the {name} set is empty; expected at least one row")
    check_readable(dataset, name=name)
    return dataset.with_format(None)  # rows of plain Python, all columns of them


def tokenize_rows(
    dataset: Dataset,
    processing_class: ProcessingClass,
    *,
    max_length: int | None,
    completion_only: bool = True,
    name: str = "forget",
    text_field: str = "text",
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
) -> Dataset:
    """As `tokenize_dataset`, but keeps every row, in order, also those without an answer left.

    Returns:
        Columns `input_ids`, `labels`, `id`, and counts that `answered_rows` reads and `drop_bookkeeping` removes.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be None or at least 2 (one token and the next), got {max_length}")
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end', got {truncation_mode!r}")
    check_columns(dataset, text_field=text_field, name=name)
    return dataset.map(
        _tokenize_row,
        fn_kwargs={
            "tokenizer": text_tokenizer(processing_class),
            "max_length": max_length,
            "completion_only": completion_only,
            "text_field": text_field,
            "truncation_mode": truncation_mode,
            "rules": digest_of_sources(Path(__file__).parent),
        },
        remove_columns=dataset.column_names,
        num_proc=None if num_proc is None else min(num_proc, len(dataset)),
        desc=f"Tokenizing {name} set",
    )


def answered_rows(rows: Dataset, *, max_length: int | None, name: str = "forget") -> list[int]:
    """Indices of the rows that still have an answer token; logs how many were cut or lost.

    Raises:
        ValueError: No row has one.
    """
    before, after = rows[_NUM_BEFORE], rows[_NUM_AFTER]
    kept = [row for row, count in enumerate(after) if count > 0]
    num_unanswered = sum(count == 0 for count in before)
    num_lost = len(rows) - len(kept) - num_unanswered
    num_cut = sum(0 < a < b for a, b in zip(after, before, strict=True))
    num_missing = sum(rows[_NUM_MISSING])
    if num_missing:
        logger.warning("%s set: the chat template leaves out %d answers, which are not trained on", name, num_missing)
    if not kept:
        cause = (
            f"all {len(rows)} answers lie beyond max_length={max_length}; raise max_length, "
            "shorten the prompts, or set truncation_mode='keep_end'"
            if num_lost
            else f"none of its {len(rows)} rows has an answer token (label other than -100)"
        )
        raise ValueError(f"nothing is left of the {name} set: {cause}")
    if num_unanswered:
        logger.warning("%s set: left out %d rows without an answer", name, num_unanswered)
    if num_lost:
        logger.warning(
            "%s set: left out %d of %d rows, whose answers lie beyond max_length=%s",
            *(name, num_lost, len(rows), max_length),
        )
    if num_cut:
        logger.warning(
            "%s set: max_length=%s cut the answers of %d of %d rows",
            *(name, max_length, num_cut, len(rows)),
        )
    return kept


def drop_bookkeeping(rows: Dataset) -> Dataset:
    """Only `input_ids`, `labels` and `id`."""
    return rows.select_columns(["input_ids", "labels", "id"])


@cache
def digest_of_sources(folder: Path) -> str:
    """A digest of the modules in a folder, by which rows that an earlier version encoded are not taken for this one's.

    `datasets` keeps what it has mapped of sets on disk, and knows a function by its name alone.
    """
    return hashlib.blake2b(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()


def text_tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer that a processor holds, or the tokenizer itself.

    Raises:
        TypeError: It is neither, or a processor without a tokenizer.
    """
    tokenizer = (
        getattr(processing_class, "tokenizer", None)
        if isinstance(processing_class, ProcessorMixin)
        else processing_class
    )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            "processing_class must be a tokenizer or a processor with a tokenizer, got "
            f"{type(processing_class).__name__}"
        )
    return tokenizer


def _tokenize_row(
    row: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    completion_only: bool,
    text_field: str,
    truncation_mode: TruncationMode,
    rules: str,  # not read: what `datasets` finds the result by again has it in it
) -> dict[str, Any]:
    encoded = encode_row(row, tokenizer, completion_only=completion_only, text_field=text_field)
    input_ids, labels = encoded.input_ids, encoded.labels
    before = num_predicted(labels)
    if max_length is not None:
        window = slice(max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
        input_ids, labels = input_ids[window], labels[window]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "id": example_id(input_ids, labels),
        _NUM_BEFORE: before,
        _NUM_AFTER: num_predicted(labels),
        _NUM_MISSING: encoded.num_missing,
    }
