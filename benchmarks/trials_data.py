"""What else can be kept: the base model's own words, and plain text. Retain rows of `trials.py`.

- "own answers": the base's greedy answers in the place of those of the retain rows.
- "own text": beside the retain rows as many that the base draws by itself (temperature 1) after "Question:", cut where
  it begins to answer, else in the middle; "own text alone": in their place. Texts with a word that forget rows have and
  retain rows do not are dropped: the base writes of what is to be forgotten, too.
- "WikiText": beside the retain rows as many of plain text, of which the second half of the words counts. Its folder,
  with `wikitext2`, is taken from `UOE_DATA`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from trials_training import RetainData

from uoe_peft.evaluation.generation import greedy_answers

BEGINNING, ANSWER = "Question:", "\nAnswer:"
MAX_NEW_TOKENS, AT_ONCE, WORDS = 96, 100, 40
Row = dict[str, str]


def kept_rows(kind: RetainData | None, retain: Dataset, forget: Dataset, *, model: Any, tokenizer: Any) -> Dataset:
    """The retain rows of a trial.

    Args:
        kind: See above; None: the rows as they are.
        retain: Rows with a prompt and a completion.
        forget: Likewise.
        model: The base, which writes.
        tokenizer: Its own.
    """
    if kind is None:
        return retain
    retain = retain.select_columns(["prompt", "completion"])
    match kind:
        case "own answers":
            return Dataset.from_list(own_answers(retain, model, tokenizer))
        case "WikiText":
            return beside(retain, plain_text(len(retain)))
        case _:
            text = own_text(len(retain), model, tokenizer, unlike=words_only_in(forget, retain))
            return Dataset.from_list(text) if kind == "own text alone" else beside(retain, text)


def beside(retain: Dataset, rows: Sequence[Row]) -> Dataset:
    """Both."""
    return concatenate_datasets([retain, Dataset.from_list(list(rows), features=retain.features)])


def own_answers(retain: Dataset, model: Any, tokenizer: Any) -> list[Row]:
    """The retain rows with what the base answers."""
    prompts = tokenizer(list(retain["prompt"]), add_special_tokens=False)["input_ids"]
    answers = greedy_answers(model, prompts, tokenizer=tokenizer, max_new_tokens=MAX_NEW_TOKENS, batch_size=AT_ONCE)
    return [
        {"prompt": prompt, "completion": f" {answer}"}
        for prompt, answer in zip(retain["prompt"], answers, strict=True)
        if answer
    ]


@torch.inference_mode()
def own_text(number: int, model: Any, tokenizer: Any, *, unlike: set[str]) -> list[Row]:
    """Texts of the base without certain words."""
    start = torch.tensor([tokenizer(BEGINNING, add_special_tokens=False)["input_ids"]] * AT_ONCE)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": MAX_NEW_TOKENS}
    rows: list[Row] = []
    while len(rows) < number:
        drawn = model.generate(input_ids=start, attention_mask=torch.ones_like(start), **options)
        texts = (text.strip() for text in tokenizer.batch_decode(drawn, skip_special_tokens=True))
        rows += [row for text in texts if not words(text) & unlike and (row := cut(text))]
    return rows[:number]


def cut(text: str) -> Row | None:
    """A text as prompt and completion; None where one of them is empty."""
    if ANSWER in text:
        prompt, _, completion = text.partition(ANSWER)
        prompt += ANSWER
    else:
        parts = text.split(" ")
        prompt, completion = (" ".join(part) for part in (parts[: len(parts) // 2], parts[len(parts) // 2 :]))
        completion = f" {completion}"
    return {"prompt": prompt, "completion": completion} if prompt.strip() and completion.strip() else None


def plain_text(number: int) -> list[Row]:
    """Beginnings of the paragraphs of WikiText's validation set."""
    folder = os.environ.get("UOE_DATA")
    if folder is None:
        raise ValueError("set UOE_DATA to a folder that has wikitext2/valid.txt")
    lines = (Path(folder) / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines()
    begun = (" ".join(line.split()[:WORDS]) for line in lines if len(line.split()) >= WORDS)
    rows = [row for row in map(cut, begun) if row]
    return rows[:number]


def words_only_in(these: Dataset, others: Dataset) -> set[str]:
    """Words that some rows have and others do not."""
    own, known = (words(" ".join(all_text(rows))) for rows in (these, others))
    return own - known


def all_text(rows: Dataset) -> Iterable[str]:
    """Prompts and completions."""
    return (f"{row['prompt']} {row['completion']}" for row in rows)


def words(text: str) -> set[str]:
    """In lower case; of a word with apostrophes or hyphens each part."""
    return set(re.findall(r"\w{3,}", text.lower()))
