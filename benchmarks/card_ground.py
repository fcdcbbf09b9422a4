"""What `card.py` works on: base model, retrained twin, what is unlearned, asked, and learned by attacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from uoe_peft.evaluation import Suite, plain_suite, testbed_suite
from uoe_peft.evaluation.suites.suite import OTHER_PROMPT, PARAPHRASED, PERTURBED
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, as_prompt, checkpoint_path, load_facts

LEFT_OUT, LEARNED_AGAIN = (3, 7), (1, 5)  # of the ten facts of a subject, or of twenty of an author: by place modulo 10


@dataclass(frozen=True)
class Ground:
    """A place to unlearn.

    Attributes:
        folders: Of the checkpoints "base" and "retrained".
        tokenizer: Of both.
        forget: What is unlearned.
        retain: What training reads to keep.
        suite: What is measured: all of `forget`, and retain rows that training has not read.
        asked: What attacks are scored on: forget rows that no attack learns from, and retain rows likewise.
        learned: What attacks learn from, by name: forget rows; facts of the same subjects that were not unlearned; rows
            that have nothing to do with either.
    """

    folders: dict[str, str]
    tokenizer: PreTrainedTokenizerBase
    forget: Dataset
    retain: Dataset
    suite: Suite
    asked: Suite
    learned: dict[str, Dataset]

    def load(self, name: str) -> PreTrainedModel:
        """A checkpoint, in float32."""
        return load(self.folders[name])


def load(folder: Any) -> PreTrainedModel:
    """A model of a folder, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def testbed_ground() -> Ground:
    """The project's own facts: two of the ten facts of each forgotten subject are left out of the unlearning."""
    facts = load_facts([FORGET_TOPIC])
    forget, same_subjects = by_place(facts, LEFT_OUT, outside=True), by_place(facts, LEFT_OUT)
    halves = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC]).train_test_split(test_size=0.5, seed=0)
    whole = testbed_suite(held_out=halves["test"])
    subjects = set(forget["prompt"])
    parts = [
        replace(part, rows=Dataset.from_list([row for row in part.rows if row["prompt"] in subjects]))  # type: ignore[union-attr]
        if part.name == "forget"
        else part
        for part in whole.sets
    ]
    asked = facts.select([i for i in range(len(facts)) if i % 10 not in LEFT_OUT + LEARNED_AGAIN])
    return Ground(
        folders={name: str(checkpoint_path(name)) for name in ("base", "retrained")},  # type: ignore[arg-type]
        tokenizer=AutoTokenizer.from_pretrained(checkpoint_path("base")),
        forget=forget,
        retain=halves["train"],
        suite=Suite("testbed", tuple(parts)),
        asked=plain_suite(with_paraphrase(asked), with_paraphrase(halves["test"])),
        learned={
            "forget rows": by_place(facts, LEARNED_AGAIN),
            "same subjects": same_subjects,
            "benign rows": halves["train"].select(range(40)),
        },
    )


def tofu_ground(base: Path, retrained: Path, data: Path) -> Ground:
    """TOFU's last 50 authors, of whom the last 5 are forgotten: see `grounds.py` for models that learned them.

    Real authors and world facts, which so small a model never learned, are left out: utility is of the retain set.
    """
    rows = [tofu_row(json.loads(line)) for line in (data / "forget10_perturbed.json").read_text("utf-8").splitlines()]
    known, last = Dataset.from_list(rows[:300]), Dataset.from_list(rows[300:])  # authors 181 to 195, 196 to 200
    full = [json.loads(line) for line in (data / "full.json").read_text("utf-8").splitlines()]
    others = Dataset.from_list([tofu_row(row) for row in full[3000:3600]])  # authors 151 to 180
    forget = by_place(last, LEFT_OUT, outside=True)
    asked = last.select([i for i in range(len(last)) if i % 10 not in LEFT_OUT + LEARNED_AGAIN])
    suite = plain_suite(forget, known, name="TOFU, last 5 of 50 authors")
    return Ground(
        folders={"base": str(base), "retrained": str(retrained)},
        tokenizer=AutoTokenizer.from_pretrained(base),
        forget=forget,
        retain=others,
        suite=suite,
        asked=plain_suite(asked, known),
        learned={
            "forget rows": by_place(last, LEARNED_AGAIN),
            "same subjects": by_place(last, LEFT_OUT),
            "benign rows": others.select(range(40)),
        },
    )


def tofu_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of TOFU as a question set wants it."""
    content = {"prompt": as_prompt(row["question"]), "completion": f" {row['answer']}"}
    if "perturbed_answer" in row:
        content[OTHER_PROMPT] = as_prompt(row["paraphrased_question"])
        content[PARAPHRASED] = f" {row['paraphrased_answer']}"
        content |= {PERTURBED: [f" {answer}" for answer in row["perturbed_answer"]]}
    return content


def by_place(rows: Dataset, places: Sequence[int], *, outside: bool = False) -> Dataset:
    """The rows whose number modulo 10 is one of `places`, or none of them."""
    return rows.select([i for i in range(len(rows)) if (i % 10 in places) != outside])


def with_paraphrase(rows: Dataset) -> Dataset:
    """Testbed facts with the paraphrased question as a prompt."""
    return rows.map(lambda row: {OTHER_PROMPT: as_prompt(row["paraphrased_question"])})
