"""What a model knows of the natural domains, and how far its experts specialise."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from uoe_peft import attribute_experts
from uoe_peft.data import IGNORE_INDEX
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.likelihood import choice_nll
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of

LETTERS = [" A", " B", " C", " D"]


def known(model: Any, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Dataset]) -> dict[str, dict[str, float]]:
    """ROUGE-L recall of greedy answers by set and topic, and the share of questions whose letter is found likeliest."""
    found: dict[str, dict[str, float]] = {}
    for name, rows in sets.items():
        asked = questions_of(rows, tokenizer, max_length=None, max_examples=None, seed=0, name=name)
        answers = greedy_answers(
            model, asked.prompts, tokenizer=tokenizer, max_new_tokens=64, batch_size=128, desc=name
        )
        rouge = rouge_l_recall(answers, asked.references)
        for topic in sorted(set(rows["topic"])):
            own = [value for value, row in zip(rouge, asked.columns, strict=True) if row["topic"] == topic]
            found[f"{name}: {topic}"] = {"rows": len(own), "rouge_l": round(fmean(own), 4)}
        found[f"{name}: MMLU"]["option_accuracy"] = round(option_accuracy(model, tokenizer, asked), 4)
    return found


def option_accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Questions) -> float:
    """The share of MMLU's questions for which the right letter is the likeliest of the four; 0.25 is chance.

    What a model can say beside letters does not count: this is the measure of https://arxiv.org/abs/2403.03218.
    """
    letters = [tokenizer(letter)["input_ids"] for letter in LETTERS]
    places = [place for place, row in enumerate(asked.asked) if asked.columns[row]["topic"] == "MMLU"]
    options = [
        [{"input_ids": prompt + letter, "labels": [IGNORE_INDEX] * len(prompt) + letter} for letter in letters]
        for prompt in (asked.prompts[place] for place in places)
    ]
    right = [LETTERS.index(f" {asked.references[place][0]}") for place in places]
    found = choice_nll(model, options, batch_size=64, desc="options")
    return fmean(own.index(min(own)) == label for own, label in zip(found, right, strict=True))


def specialisation(
    model: Any, tokenizer: PreTrainedTokenizerBase, forget: Dataset, kept: Dataset
) -> dict[str, dict[str, Any]]:
    """Of the expert that each score puts first: mean gate score on the forget set, on all else, and their ratio."""
    found = {}
    for score in ("gate", "contrast"):
        own = attribute_experts(
            model, forget, processing_class=tokenizer, score=score, retain_dataset=kept, seed=0, show_progress=False
        )
        pair = own.top(1)[0]
        assert own.forget is not None and own.retain is not None
        uses = [own.value(use.table(own.gate), pair) for use in (own.forget, own.retain)]
        found[score] = {"expert": list(pair), "forget": uses[0], "retain": uses[1], "lift": own.lift(pair)}
    return found
