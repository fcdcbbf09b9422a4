"""Ask the base model, the unlearned one and a retrained one the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, cast

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from uoe_peft.data.tokenization import text_tokenizer
from uoe_peft.evaluation.attacking import Attacks, attack_all
from uoe_peft.evaluation.calibration import Calibration
from uoe_peft.evaluation.evidence import CostClock, adapter_cost, changed_cost, has_routed_experts, routing_shifts
from uoe_peft.evaluation.evidence.settings import settings_of
from uoe_peft.evaluation.fluency import fluency_of
from uoe_peft.evaluation.likelihood import vocab_size
from uoe_peft.evaluation.measure import AnyModel, Asked, Asking, Measured, measure
from uoe_peft.evaluation.questions import Choices, choices_of, questions_of, sample
from uoe_peft.evaluation.report import AttackRun, ModelName, UnlearningReport
from uoe_peft.evaluation.report.summary import (
    answer_scores,
    check_values,
    example_table,
    model_metrics,
    scores_by_value,
)
from uoe_peft.evaluation.score import SuiteScore
from uoe_peft.evaluation.suites import QuestionSet, Suite, plain_suite
from uoe_peft.evaluation.suites.suite import OPTIONS
from uoe_peft.evaluation.switching import before_unlearning, scaled
from uoe_peft.moe.passes import find_streamed
from uoe_peft.precision import say_if_slow


def evaluate_unlearning(
    model: PeftModel | PreTrainedModel,
    suite: Suite | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    forget_dataset: Dataset | IterableDataset | None = None,
    retain_dataset: Dataset | IterableDataset | None = None,
    base_model: PreTrainedModel | None = None,
    retrained_model: PreTrainedModel | PeftModel | None = None,
    attacks: Attacks = (),
    attack_examples: int = 40,
    calibration: Calibration | None = None,
    max_examples: int | None = None,
    batch_size: int = 16,
    max_length: int | None = 1024,
    max_new_tokens: int = 128,
    seed: int = 0,
    cache_dir: str | PathLike[str] | None = None,
) -> UnlearningReport:
    """What is forgotten, what is kept, where tokens go, and what attacks bring back: adapter off (base) against on.

    ROUGE-L is of the last answer of a row, generated greedily from all that stands before it; the probability is over
    every answer token of the row. These measure what the model says when asked plainly: pass attacks to see what is
    only hidden. Every parameter requires a gradient or not afterwards as before.

    Args:
        model: A `PeftModel` whose adapter is the unlearning; or, with `base_model`, a model trained in full.
        suite: What is asked; or pass `forget_dataset` and `retain_dataset`.
        processing_class: The model's tokenizer, or a processor that holds one.
        forget_dataset: What should be forgotten, in any type that training reads. Rows of plain text have no prompt to
            answer: they get no ROUGE-L, and a note says so.
        retain_dataset: What should be kept, likewise.
        base_model: What a model without an adapter was before it forgot; a `PeftModel` brings its own.
        retrained_model: A model trained without the forget set, the gold reference; it reads the same tokens.
        attacks: Run on the unlearned model at full strength, at the scale of `calibration`, and on the retrained model:
            what they "recover" there is the baseline. One that needs what a model lacks, such as an adapter, is left
            out with a note. The keys of a mapping name them in the report.
        attack_examples: Rows of the first forget and of the first retain set that attacks are scored on.
        calibration: What `calibrate_scale` chose, on other rows than these: shown with its curve, and the model at
            this scale is evaluated as "calibrated".
        max_examples: Draw so many rows of each set; None for all. A streaming set needs it.
        batch_size: Rows a forward pass.
        max_length: Longest sequence in tokens, prompt and answer; None for no limit.
        max_new_tokens: Where a generated answer is cut.
        seed: Of the draw.
        cache_dir: Folder for generated answers, so that the same call goes on where it was stopped; None: not kept.

    Returns:
        The scores of "base", "unlearned" and, where given, "calibrated" and "retrained", with all else in the report.

    Raises:
        TypeError: `model` has no adapter to switch off and `base_model` is missing, or a set is no `Dataset`.
        ValueError: Both or neither of suite and sets; the adapter is switched off or merged already; `base_model` with
            an adapter, or `calibration` without one; a set is empty, has no usable columns or answers, or no value in
            a column to score by; `max_examples`, `batch_size` or `max_new_tokens` is below 1; base or retrained model
            has another vocabulary; logits are not finite.
        ImportError: A package of the extra "eval" is missing.
    """
    clock = CostClock()
    _check_counts(batch_size=batch_size, max_new_tokens=max_new_tokens, attack_examples=attack_examples)
    _check(model, base_model, calibration)
    _check_vocabularies(model, {"base": base_model, "retrained": retrained_model})
    say_if_slow(model)
    suite = _suite(suite, forget_dataset, retain_dataset)
    asking = Asking(text_tokenizer(processing_class), batch_size, max_new_tokens, cache_dir)
    sampled = {
        part.name: sample(part.rows, max_examples=max_examples, seed=seed, name=part.name) for part in suite.sets
    }
    sets = {part.name: _ask(sampled[part.name], part, asking, max_length=max_length) for part in suite.sets}
    for part in suite.sets:
        check_values(part, sets[part.name])
    results = _measure_all(model, base_model, retrained_model, sets, asking, calibration)
    notes = [asked.note for asked in sets.values() if not isinstance(asked, Choices) and asked.note]
    metrics = model_metrics(results, suite)
    with before_unlearning(model, base_model) as judge:
        for name, own in fluency_of(judge, results, suite, sets, asking).items():
            metrics[name] |= own
    runs: list[AttackRun] = []
    if attacks:
        score = SuiteScore(
            Suite(suite.name, tuple(replace(part, rows=sampled[part.name]) for part in suite.sets)),
            asking.tokenizer,
            max_examples=attack_examples,
            batch_size=batch_size,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        runs, refused = attack_all(model, retrained_model, attacks, score, calibration=calibration)
        notes += refused
    if find_streamed(model) is not None:
        notes.append("the model was streamed from disk: no answers were generated, and routing was not compared")
    elif not results["base"].routing:
        called = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
        notes.append(f"{called} has no routed experts: there is no routing to compare")
    return UnlearningReport(
        scores={
            name: {part.name: answer_scores(measured.rows[part.name], part) for part in suite.sets}
            for name, measured in results.items()
        },
        notes=tuple(notes),
        by_value=tuple(value for part in suite.sets for value in scores_by_value(results, part, sets[part.name])),
        metrics=metrics,
        routing=routing_shifts(results["base"].routing, results["unlearned"].routing),
        attacks=tuple(runs),
        calibration=calibration,
        roles={part.name: part.role for part in suite.sets},
        settings=settings_of(model, suite, sets, asking, max_length=max_length, max_examples=max_examples, seed=seed),
        cost=_cost(model, base_model) | clock.read(),
        examples=example_table(results, suite, sets, _prompt_texts(sets, asking.tokenizer)),
    )


def _suite(suite: Suite | None, forget: Any, retain: Any) -> Suite:
    if (suite is None) == (forget is None and retain is None):
        raise ValueError("pass either a suite, or forget_dataset and retain_dataset")
    if suite is not None:
        return suite
    if forget is None or retain is None:
        raise ValueError(
            "pass both forget_dataset and retain_dataset: what is kept counts as much as what is forgotten"
        )
    return plain_suite(forget, retain)


def _ask(rows: Dataset, part: QuestionSet, asking: Asking, *, max_length: int | None) -> Asked:
    if OPTIONS in rows.column_names:
        return choices_of(rows, asking.tokenizer, max_length=max_length, name=part.name)
    return questions_of(rows, asking.tokenizer, max_length=max_length, max_examples=None, seed=0, name=part.name)


def _measure_all(
    model: AnyModel,
    base_model: PreTrainedModel | None,
    retrained_model: AnyModel | None,
    sets: Mapping[str, Asked],
    asking: Asking,
    calibration: Calibration | None,
) -> dict[ModelName, Measured]:
    # Routing is read after a pass, when a streamed model has gone on to the next layer.
    num_experts = {} if find_streamed(model) is not None else has_routed_experts(model)
    scale = None if calibration is None else calibration.scale
    results: dict[ModelName, Measured] = {}
    with before_unlearning(model, base_model) as base:
        results["base"] = measure(base, sets, asking, called="base", num_experts=num_experts)
    results["unlearned"] = measure(model, sets, asking, called="unlearned", num_experts=num_experts)
    if scale not in (None, 1.0):
        with scaled(model, scale):
            results["calibrated"] = measure(model, sets, asking, called="calibrated", num_experts={})
    if retrained_model is not None:
        results["retrained"] = measure(retrained_model, sets, asking, called="retrained", num_experts={})
    return results


def _cost(model: AnyModel, base_model: PreTrainedModel | None) -> dict[str, float]:
    return (
        adapter_cost(model) if isinstance(model, PeftModel) else changed_cost(model, cast(PreTrainedModel, base_model))
    )


def _prompt_texts(sets: Mapping[str, Asked], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for name, asked in sets.items():
        if isinstance(asked, Choices):
            texts[name] = [str(row["prompt"]) for row in asked.columns]
            continue
        texts[name] = [""] * len(asked.examples)
        for place, prompt in zip(asked.asked, asked.prompts, strict=True):
            texts[name][place] = str(tokenizer.decode(prompt, skip_special_tokens=True))
    return texts


def _check(model: Any, base_model: AnyModel | None, calibration: Calibration | None) -> None:
    if not isinstance(model, PeftModel):
        if base_model is None:
            raise TypeError(
                f"model must be a PeftModel, whose adapter can be switched off, got {type(model).__name__}; use "
                "get_peft_model, PeftModel.from_pretrained or a trainer's model, or pass base_model, what it was before"
            )
        if base_model is model or has_routed_experts(base_model) != has_routed_experts(model):
            raise ValueError("base_model must be another model, of the same architecture: what model was before")
        if calibration is not None:
            raise ValueError(f"calibration is of an adapter's scale, and {type(model).__name__} has no adapter")
        return
    if base_model is not None:
        raise ValueError("model has an adapter, and its base is what it is without; leave base_model out")
    status = model.get_model_status()
    if status.merged_adapters:
        raise ValueError(
            f"the adapters {status.merged_adapters} are merged, and switching them off would unmerge them; call "
            "unmerge_adapter() first"
        )
    if status.enabled is False:
        raise ValueError("the adapter is switched off, so base and unlearned would be the same model; enable it first")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_vocabularies(model: AnyModel, others: Mapping[str, AnyModel | None]) -> None:
    own = vocab_size(model)
    for name, other in others.items():
        if other is not None and vocab_size(other) != own:
            raise ValueError(
                f"the {name} model has a vocabulary of {vocab_size(other)} tokens, the model one of {own}; a reference "
                "must read the same tokens"
            )
