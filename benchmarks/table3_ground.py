"""What all runs of `table3.py` share: models, rows, questions and limits; and how a model is scored on them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from table3_report import Limits
from table3_settings import Table3Arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import ExpertAttribution, attribute_experts
from uoe_peft.cli.loading import load_rows
from uoe_peft.data.alternatives import load_idk_answers
from uoe_peft.evaluation.attacks import quantization, relearning
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.likelihood import score_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, is_refusal, load_facts


@dataclass(frozen=True, eq=False)
class Ground:
    """What all runs share; `asked` by half and role."""

    args: Table3Arguments
    base: str
    forget: Dataset
    retain: Dataset
    relearned: Dataset
    asked: dict[str, dict[str, Questions]]
    attributions: dict[str, ExpertAttribution]
    tokenizer: Any
    limits: Limits


def prepare(args: Table3Arguments) -> tuple[Ground, dict[str, dict[str, float]]]:
    """What all runs share; and the scores of base and twin on the test half."""
    base, twin, forget, everything = sources(args)
    tokenizer = AutoTokenizer.from_pretrained(base)
    halves = everything.train_test_split(test_size=0.5, seed=0)
    asked_of = {
        "forget": forget.train_test_split(test_size=0.5, seed=0),
        "retain": halves["test"].train_test_split(test_size=0.5, seed=0),
    }
    asked = {
        half: {
            role: questions_of(asked_of[role][split], tokenizer, max_length=None, max_examples=n, seed=0, name=role)
            for role, n in zip(asked_of, numbers, strict=True)
        }
        for half, split, numbers in (("validation", "train", args.num_validation), ("test", "test", args.num_test))
    }
    attributions = {
        score: attribute_experts(
            load(base, args.dtype),
            forget,
            processing_class=tokenizer,
            score=score,
            retain_dataset=halves["train"],
            seed=0,
            show_progress=False,
        )
        for score in ("gate", "contrast")
    }
    relearned = asked_of["forget"]["train"].select(range(min(args.num_relearned, len(asked_of["forget"]["train"]))))
    nothing = Limits(0.0, 0.0)  # until the twin has set them
    ground = Ground(args, base, forget, halves["train"], relearned, asked, attributions, tokenizer, nothing)
    ground, references = compared(ground, twin)
    tops = {score: attribution.top(1) for score, attribution in attributions.items()}
    print(f"{tops}\n{references}\n{ground.limits}", flush=True)
    return ground, references


def compared(ground: Ground, twin: str) -> tuple[Ground, dict[str, dict[str, float]]]:
    """The ground with the limits that its twin sets; and what base and twin score, read where it was written before."""
    path = ground.args.output_dir / "references.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if found is None or (ground.args.attacks and "relearned" not in found["retrained"]):
        model = load(twin, ground.args.dtype)
        twins = [scores(ground, model, half) for half in ground.asked]
        names = ("forget", "probability")
        found = {
            "limits": {name: fmean(own[name] for own in twins) + ground.args.margin for name in names},
            "base": scores(ground, load(ground.base, ground.args.dtype), "test"),
            "retrained": tested(ground, model),
        }
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return replace(ground, limits=Limits(**found.pop("limits"))), found


def sources(args: Table3Arguments) -> tuple[str, str, Dataset, Dataset]:
    """Names of base and twin; the forget set and all else that the base knows.

    Raises:
        ValueError: A model of one's own comes without its twin or sets.
    """
    if args.model_name_or_path is None:
        others = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC])
        return str(checkpoint_path("base")), str(checkpoint_path("retrained")), load_facts([FORGET_TOPIC]), others
    if not (args.retrained_model and args.forget_dataset and args.retain_dataset):
        raise ValueError(
            "a model of your own needs --retrained_model, which says what counts as forgotten, and --forget_dataset "
            "and --retain_dataset"
        )
    forget, everything = load_rows(args.forget_dataset), load_rows(args.retain_dataset)
    return args.model_name_or_path, args.retrained_model, forget, everything


def load(name: str, dtype: str) -> Any:
    """A model, fresh from disk, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(torch.accelerator.current_accelerator() or "cpu").eval()


@cache
def base_weights(name: str, dtype: str) -> dict[str, torch.Tensor]:
    """The weights of the base model; not to be changed."""
    return dict(load(name, dtype).state_dict())


def ask(ground: Ground, model: Any, half: str, role: str) -> list[str]:
    """Greedy answers to the questions of a half and role."""
    return greedy_answers(
        model,
        ground.asked[half][role].prompts,
        tokenizer=ground.tokenizer,
        max_new_tokens=ground.args.max_new_tokens,
        batch_size=128,
        desc=role,
    )


def scores(ground: Ground, model: Any, half: str) -> dict[str, float]:
    """ROUGE-L of each role; of forget rows probability and share of refusals; of retain rows the worst topic's."""
    if model.dtype != (dtype := getattr(torch, ground.args.score_dtype or ground.args.dtype)):
        model = copy.deepcopy(model).to(dtype)
    asked, answers = ground.asked[half], {role: ask(ground, model, half, role) for role in ("forget", "retain")}
    rouge = {role: rouge_l_recall(answers[role], asked[role].references) for role in answers}
    tokens = score_answers(model, asked["forget"].examples, batch_size=64, desc="forget")
    refusals = {text.strip() for text in load_idk_answers()}
    found = {role: fmean(values) for role, values in rouge.items()}
    found["probability"] = fmean(float(own.log_probs.mean().exp()) for own in tokens)
    found["refusals"] = fmean(is_refusal(answer) or answer in refusals for answer in answers["forget"])
    by_topic: dict[Any, list[float]] = {}
    for place, value in zip(asked["retain"].asked, rouge["retain"], strict=True):
        by_topic.setdefault(asked["retain"].columns[place].get("topic"), []).append(value)
    if None not in by_topic:
        found["worst topic"] = min(map(fmean, by_topic.values()))
    return found


def tested(ground: Ground, model: Any) -> dict[str, float]:
    """The scores of the test half; with `attacks` also of copies that relearned other forget rows, or were rounded."""

    def rouge(attacked: Any, *, roles: Sequence[str]) -> dict[str, float]:
        own = ground.asked["test"]
        return {
            role: fmean(rouge_l_recall(ask(ground, attacked, "test", role), own[role].references)) for role in roles
        }

    before = scores(ground, model, "test")
    if not ground.args.attacks:
        return before
    relearned = relearning(
        model,
        ground.relearned,
        processing_class=ground.tokenizer,
        score=lambda attacked, **_: rouge(attacked, roles=["forget"]),
        steps=(6, 12, 18, 24),
        learning_rate=2e-4,
        batch_size=8,
        before={"forget": before["forget"]},
    )
    rounded = quantization(
        model,
        score=lambda attacked, **_: rouge(attacked, roles=["forget", "retain"]),
        bits=4,
        group_size=64,
        before=before,
    )
    attacks = {f"int4 {role}": rounded.after[role] for role in ("forget", "retain")}
    return {**before, "relearned": relearned.after["forget"], **attacks}


def rounded(found: Mapping[str, float]) -> dict[str, float]:
    """Scores with four places, for a file that people read."""
    return {name: round(value, 4) for name, value in found.items()}
