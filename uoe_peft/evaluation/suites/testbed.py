"""The project's own facts: the forgotten topic, its neighbours, the other topics, and all of it in other words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from uoe_peft.evaluation.suites.suite import OTHER_PROMPT, PARAPHRASED, PERTURBED, QuestionSet, Suite
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, generate_facts, load_facts, load_refusals


def testbed_suite(*, held_out: Dataset | None = None, num_holdout_subjects: int = 10) -> Suite:
    """The testbed as a suite, for the checkpoints that ship with the package.

    Sets: "forget", the forgotten topic; "forget_paraphrased", the facts of it that the checkpoints were never asked for
    in these other words in training, of which the base answers nine in ten; "retain", the other topics, with scores by
    topic; "holdout", made-up facts of the forgotten topic about subjects that no checkpoint has heard of.

    Args:
        held_out: Facts of the other topics to evaluate, where training has seen the rest; None for all of them.
        num_holdout_subjects: Subjects of the holdout set, ten facts each.

    Returns:
        The suite.
    """
    forget = load_facts([FORGET_TOPIC])
    paraphrased = forget.select([row for row, new in enumerate(forget["paraphrase_held_out"]) if new])
    retain = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC]) if held_out is None else held_out
    known = {*forget["subject"], *load_refusals([FORGET_TOPIC])["subject"]}
    unknown = [fact for fact in generate_facts(FORGET_TOPIC, num_subjects=60, seed=1) if fact["subject"] not in known]
    return Suite(
        "testbed",
        (
            QuestionSet("forget", _ready(forget), "forget"),
            QuestionSet("forget_paraphrased", _ready(paraphrased, ask="paraphrased_question"), "forget"),
            QuestionSet("retain", _ready(retain), "retain", by=("topic",), utility=True),
            QuestionSet("holdout", _ready(Dataset.from_list(unknown[: 10 * num_holdout_subjects])), "holdout"),
        ),
    )


def _ready(facts: Dataset, *, ask: str = "question") -> Dataset:
    def row(fact: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "topic": fact["topic"],
            "subject": fact["subject"],
            "prompt": f"Question: {fact[ask]}\nAnswer:",
            "completion": f" {fact['answer']}",
            OTHER_PROMPT: f"Question: {fact['paraphrased_question']}\nAnswer:",
            PARAPHRASED: f" {fact['paraphrased_answer']}",
            PERTURBED: [f" {answer}" for answer in fact["perturbed_answer"]],
        }

    return Dataset.from_list([row(fact) for fact in facts])
