"""A forget or retain set -> what is asked, and what should be answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from uoe_peft.data import IGNORE_INDEX, tokenize_dataset
from uoe_peft.data.tokenization import answered_rows, drop_bookkeeping, materialise, tokenize_rows
from uoe_peft.evaluation.suites.suite import LABEL, OPTIONS, OTHER_PROMPT, PARAPHRASED, PERTURBED

_MEANT = {"prompt", "completion", "messages", "text", "input_ids", "labels", "completion_mask", "attention_mask"}
_MEANT |= {PARAPHRASED, PERTURBED, OPTIONS, LABEL, OTHER_PROMPT, "tools", "chat_template_kwargs"}


@dataclass(frozen=True)
class Questions:
    """A set, ready to be asked.

    Attributes:
        examples: Rows with `input_ids` and `labels`.
        prompts: Token ids of what stands before a row's last answer; rows that are all answer have none.
        references: The answers to the prompts.
        note: What is missing, and why; empty where nothing is.
        asked: Which of the examples the prompts belong to.
        paraphrases: For each example, the true answer in other words as `input_ids` and `labels`; or nothing at all.
        false_answers: For each example, its false answers likewise; or nothing at all.
        columns: For each example, the other columns of its row.
    """

    examples: list[dict[str, Any]]
    prompts: list[list[int]]
    references: list[str]
    note: str
    asked: list[int] = field(default_factory=list)
    paraphrases: list[dict[str, Any]] = field(default_factory=list)
    false_answers: list[list[dict[str, Any]]] = field(default_factory=list)
    columns: list[dict[str, Any]] = field(default_factory=list)


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
        dataset: The set, in any of TRL's types; `QuestionSet` says what else its columns can hold.
        tokenizer: Of the models that will be asked.
        max_length: Longest sequence in tokens.
        max_examples: Draw so many rows without replacement; of a streaming set, take the first so many. None: all.
        seed: Of the draw.
        name: What messages call the set.

    Returns:
        The questions; `prompts` and `references` are of equal length, `examples` of at least theirs.

    Raises:
        TypeError: `dataset` is neither a `Dataset` nor an `IterableDataset`.
        ValueError: The set is empty, has no usable columns or no answer; a row has no false answer where others have;
            or `max_examples` is below 1.
    """
    rows = sample(dataset, max_examples=max_examples, seed=seed, name=name)
    tokens = tokenize_rows(rows, tokenizer, max_length=max_length, name=name)
    kept = answered_rows(tokens, max_length=max_length, name=name)
    rows, tokens = rows.select(kept), tokens.select(kept)
    examples = [dict(row) for row in drop_bookkeeping(tokens)]
    spans = [last_answer(example["labels"]) for example in examples]
    asked = [place for place, span in enumerate(spans) if span.start > 0]
    answers = [examples[place]["input_ids"][spans[place]] for place in asked]
    return Questions(
        examples=examples,
        prompts=[examples[place]["input_ids"][: spans[place].start] for place in asked],
        references=[str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers],
        note=_note(name, num_examples=len(examples), num_prompts=len(asked)),
        asked=asked,
        paraphrases=_other_answers(rows, PARAPHRASED, tokenizer, max_length=max_length, name=name),
        false_answers=_false_answers(rows, tokenizer, max_length=max_length, name=name),
        columns=[{key: value for key, value in row.items() if key not in _MEANT} for row in rows],
    )


def sample(dataset: Dataset | IterableDataset, *, max_examples: int | None, seed: int, name: str) -> Dataset:
    """At most so many rows, drawn without replacement; errors as in `questions_of`."""
    if isinstance(dataset, Dataset) and max_examples is not None and len(dataset) > max_examples > 0:
        dataset = dataset.shuffle(seed=seed).select(range(max_examples))
    return materialise(dataset, max_examples=max_examples, name=name)


def last_answer(labels: list[int]) -> slice:
    """Where the last run of answer tokens (labels other than -100) stands; labels hold at least one such token."""
    end = len(labels)
    while labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return slice(start, end)


def _false_answers(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, name: str
) -> list[list[dict[str, Any]]]:
    if PERTURBED not in rows.column_names:
        return []
    counts = [len(answers or ()) for answers in rows[PERTURBED]]
    if 0 in counts:
        raise ValueError(f"row {counts.index(0)} of the {name} set has no {PERTURBED}; give each row one, or drop it")
    flat = [{**row, PERTURBED: answer} for row in rows for answer in row[PERTURBED]]
    examples = iter(_other_answers(Dataset.from_list(flat), PERTURBED, tokenizer, max_length=max_length, name=name))
    return [[next(examples) for _ in range(count)] for count in counts]


def _other_answers(
    rows: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, name: str
) -> list[dict[str, Any]]:
    """Each row's prompt with the answer of a column in place of its own; empty where there is no such column."""
    if column not in rows.column_names:
        return []
    if "prompt" not in rows.column_names:
        raise ValueError(f"the {name} set has {column!r}, but no 'prompt' that this would answer")
    pairs = Dataset.from_list(
        [{"prompt": row["prompt"], "completion": _completion(row["prompt"], row[column])} for row in rows]
    )
    examples = tokenize_dataset(pairs, tokenizer, max_length=max_length, name=f"{name}: {column}")
    if len(examples) < len(pairs):
        raise ValueError(f"{column} of {len(pairs) - len(examples)} rows of the {name} set lies beyond {max_length=}")
    return [dict(example) for example in examples]


def _completion(prompt: Any, answer: Any) -> Any:
    """The answer in the form of the prompt: a message for a conversation."""
    return (
        [{"role": "assistant", "content": answer}] if isinstance(answer, str) and isinstance(prompt, list) else answer
    )


def _note(name: str, *, num_examples: int, num_prompts: int) -> str:
    if num_prompts == num_examples:
        return ""
    without = f"{name} set: {num_examples - num_prompts} of {num_examples} rows are text without a prompt to answer"
    if num_prompts == 0:
        return f"{without}, so there is no ROUGE-L; pass 'prompt' and 'completion' columns to get it"
    return f"{without}, so ROUGE-L is over the other {num_prompts}"


@dataclass(frozen=True)
class Choices:
    """A set of questions with options.

    Attributes:
        examples: For each question, its options as `input_ids` and `labels`.
        labels: The place of the right one.
        columns: For each question, the other columns of its row, and its prompt.
    """

    examples: list[list[dict[str, Any]]]
    labels: list[int]
    columns: list[dict[str, Any]]


def choices_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, name: str) -> Choices:
    """The questions of a set with `options` and `label`; an option ends with its last word, not with an end of text.

    Args:
        rows: The set, with `prompt` as text.
        tokenizer: Of the models that will be asked.
        max_length: Longest sequence in tokens.
        name: What messages call the set.

    Raises:
        ValueError: A prompt is no text, a row has fewer than two options, a label is none of them, or a question is
            longer than `max_length`.
    """
    examples = []
    for place, row in enumerate(rows):
        options, label = list(row[OPTIONS] or ()), row[LABEL]
        if not isinstance(row["prompt"], str) or len(options) < 2 or label not in range(len(options)):
            raise ValueError(
                f"row {place} of the {name} set needs a prompt of text, two options or more, and a label that is one "
                f"of their places; got a {type(row['prompt']).__name__}, {len(options)} options and {label!r}"
            )
        encoded = [_continued(row["prompt"], option, tokenizer) for option in options]
        if max_length is not None and max(len(option["input_ids"]) for option in encoded) > max_length:
            raise ValueError(f"row {place} of the {name} set is longer than {max_length=} tokens; raise it, or drop it")
        examples.append(encoded)
    return Choices(
        examples, list(rows[LABEL]), [{k: v for k, v in row.items() if k not in (OPTIONS, LABEL)} for row in rows]
    )


def _continued(prompt: str, option: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    before: Sequence[int] = tokenizer(prompt)["input_ids"]
    whole: Mapping[str, Any] = tokenizer(prompt + option)
    ids = list(whole["input_ids"])
    if tokenizer.eos_token_id is not None and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # some tokenizers end every text
    start = next((place for place, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
    start = min(start, len(ids) - 1)
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * start + ids[start:]}
