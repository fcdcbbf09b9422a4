"""A forget or retain set -> what is asked, and what should be answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from uoe_peft.data import IGNORE_INDEX, tokenize_dataset


@dataclass(frozen=True)
class Questions:
    """A set, ready to be asked.

    Attributes:
        examples: Rows with `input_ids` and `labels`.
        prompts: Token ids of what stands before a row's last answer; rows that are all answer have none.
        references: The answers to the prompts.
        note: What is missing, and why; empty where nothing is.
    """

    examples: list[dict[str, Any]]
    prompts: list[list[int]]
    references: list[str]
    note: str


def questions_of(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_examples: int | None,
    seed: int,
    name: str,
) -> Questions:
    """The questions of a set, or of a sample of it.

    Args:
        dataset: The set, in any type that training reads.
        tokenizer: Of the models that will be asked.
        max_length: Longest sequence in tokens.
        max_examples: Draw so many rows without replacement; of a streaming set, take the first so many. None: all.
        seed: Of the draw.
        name: What messages call the set.

    Returns:
        The questions; `prompts` and `references` are of equal length, `examples` of at least theirs.

    Raises:
        TypeError: `dataset` is neither a `Dataset` nor an `IterableDataset`.
        ValueError: The set is empty, has no usable columns or no answer; or `max_examples` is below 1.
    """
    if isinstance(dataset, Dataset) and max_examples is not None and len(dataset) > max_examples > 0:
        dataset = dataset.shuffle(seed=seed).select(range(max_examples))
    rows = tokenize_dataset(dataset, tokenizer, max_length=max_length, max_examples=max_examples, name=name)
    examples = [dict(row) for row in rows]
    spans = [last_answer(example["labels"]) for example in examples]
    asked = [(example["input_ids"], span) for example, span in zip(examples, spans, strict=True) if span.start > 0]
    return Questions(
        examples=examples,
        prompts=[ids[: span.start] for ids, span in asked],
        references=[str(tokenizer.decode(ids[span], skip_special_tokens=True)).strip() for ids, span in asked],
        note=_note(name, num_examples=len(examples), num_prompts=len(asked)),
    )


def last_answer(labels: list[int]) -> slice:
    """Where the last run of answer tokens (labels other than -100) stands; labels hold at least one such token."""
    end = len(labels)
    while labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return slice(start, end)


def _note(name: str, *, num_examples: int, num_prompts: int) -> str:
    if num_prompts == num_examples:
        return ""
    without = f"{name} set: {num_examples - num_prompts} of {num_examples} rows are text without a prompt to answer"
    if num_prompts == 0:
        return f"{without}, so there is no ROUGE-L; pass 'prompt' and 'completion' columns to get it"
    return f"{without}, so ROUGE-L is over the other {num_prompts}"
