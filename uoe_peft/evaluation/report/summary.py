"""Examples of all models and sets -> means with intervals, scores by value, and the numbers of whole models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from datasets import Dataset

from uoe_peft.evaluation.measure import Asked, Measured, Row
from uoe_peft.evaluation.metrics import (
    bootstrap_interval,
    forget_quality,
    membership_auc,
    model_utility,
    perplexity,
    privleak,
    rr2r,
    says_something_else,
    truth_ratio_score,
)
from uoe_peft.evaluation.questions import Choices
from uoe_peft.evaluation.report import AnswerScores, ModelName, ValueScores
from uoe_peft.evaluation.suites.suite import QuestionSet, Suite

AUCS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")

Results = Mapping[ModelName, Measured]


def answer_scores(rows: Sequence[Row], part: QuestionSet) -> AnswerScores:
    """Means of a set's examples with their intervals.

    Args:
        rows: The examples.
        part: The set: what it is there for decides which truth ratio is good.
    """
    better: Any = "closer_to_1_better" if part.role == "forget" else "true_better"
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float):
                values.setdefault(name, []).append(truth_ratio_score(value, better) if name == "truth_ratio" else value)
    metrics = {name: bootstrap_interval(found) for name, found in values.items() if np.isfinite(found).all()}
    recall = metrics.get("rouge_l_recall")
    return AnswerScores(
        rouge_l_recall=recall.mean if recall else None,
        probability=metrics["probability"].mean,
        num_examples=len(rows),
        metrics=metrics,
    )


def check_values(part: QuestionSet, asked: Asked) -> None:
    """Refuse a set whose rows do not all have a value to score by, before any of them is asked.

    Raises:
        ValueError: A value is missing or empty.
    """
    for column in part.by:
        values = [row.get(column) for row in asked.columns]
        empty = [place for place, value in enumerate(values) if value is None or str(value).strip() == ""]
        if empty:
            raise ValueError(
                f"row {empty[0]} of the {part.name} set has no {column!r} to score by ({len(empty)} of {len(values)} "
                "rows have none); fill it in, or drop these rows"
            )


def scores_by_value(results: Results, part: QuestionSet, asked: Asked) -> list[ValueScores]:
    """Scores of the rows of a set that share a value of one of its columns, which `check_values` has seen."""
    found = []
    for column in part.by:
        values = [row[column] for row in asked.columns]
        for value in sorted(set(map(str, values))):
            places = [place for place, own in enumerate(values) if str(own) == value]
            scores = {
                model: answer_scores([measured.rows[part.name][place] for place in places], part)
                for model, measured in results.items()
            }
            found.append(ValueScores(part.name, column, value, scores))
    return found


def model_metrics(results: Results, suite: Suite) -> dict[ModelName, dict[str, float]]:
    """By model: model utility; forget quality against the retrained model; membership AUCs, forget against holdout.

    What the suite lacks the sets or columns for is left out.
    """
    found: dict[ModelName, dict[str, float]] = {model: {} for model in results}
    for model, measured in results.items():
        found[model] |= _utility(measured, suite) | _membership(measured, suite)
    if "retrained" not in results:
        return found
    first = suite.of_role("forget")[0].name
    reference = [row["truth_ratio"] for row in results["retrained"].rows[first] if "truth_ratio" in row]
    for model, own in found.items():
        if reference and model != "retrained":
            ratios = [row["truth_ratio"] for row in results[model].rows[first]]
            own["forget_quality"] = forget_quality(ratios, reference)
        auc = found["retrained"].get("mia_min_k")
        if auc is not None and auc < 1:
            own["privleak"] = privleak(own["mia_min_k"], auc)
    return found


def fluency_metrics(
    said: Mapping[str, Sequence[tuple[float, int]]],
    usual: Sequence[tuple[float, int]],
    rows: Mapping[str, Sequence[Row]],
) -> dict[str, float]:
    """How fluent a model's answers are, and how well it says other things where it should and only there.

    Args:
        said: Of the answers to the forget and to the retain set, by role: negative log-likelihood under the base model,
            in nats, and number of tokens.
        usual: The same of answers that are language. An answer counts as fluent where its perplexity is not above that
            of 19 of 20 of these.
        rows: The examples that were answered, by role, in the same order.

    Returns:
        `forget_perplexity`, where something was said, and `rr2r`.
    """
    limit = float(np.quantile([_perplexity(*pair) for pair in usual], 0.95))
    other = {
        role: [
            says_something_else(row["rouge_l_recall"], row["repetition"], _perplexity(*pair), max_perplexity=limit)
            for row, pair in zip(rows[role], pairs, strict=True)
        ]
        for role, pairs in said.items()
    }
    words = [pair for pair in said["forget"] if pair[1]]
    found = {"forget_perplexity": perplexity(*map(list, zip(*words, strict=True)))} if words else {}
    return found | {"rr2r": rr2r(other["forget"], other["retain"])}


def example_table(
    results: Results, suite: Suite, sets: Mapping[str, Asked], prompts: Mapping[str, list[str]]
) -> Dataset:
    """Every example in a row: its set, question and truth, other columns as JSON, and each model's answer and metrics.

    Args:
        results: What the models did.
        suite: The sets, in order.
        sets: Their questions.
        prompts: The text of each question, by set.
    """
    rows = []
    for part in suite.sets:
        asked = sets[part.name]
        truths = [""] * len(asked.columns)
        if not isinstance(asked, Choices):
            for place, reference in zip(asked.asked, asked.references, strict=True):
                truths[place] = reference
        for place, columns in enumerate(asked.columns):
            row: Row = {"set": part.name, "row": place, "prompt": prompts[part.name][place], "truth": truths[place]}
            row["columns"] = json.dumps(columns, default=str)
            for model, measured in results.items():
                row |= {f"{name}_{model}": value for name, value in measured.rows[part.name][place].items()}
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _utility(measured: Measured, suite: Suite) -> dict[str, float]:
    """TOFU's: sets whose wording was taught count with their probability, others with that among the options."""
    scores = []
    for part in (part for part in suite.sets if part.utility):
        rows = measured.rows[part.name]
        if not all("truth_ratio" in row and "rouge_l_recall" in row for row in rows):
            return {}
        among = part.name in ("real_authors", "world_facts")
        scores.append(fmean(row["probability_w_options" if among else "probability"] for row in rows))
        scores.append(fmean(row["rouge_l_recall"] for row in rows))
        scores.append(fmean(truth_ratio_score(row["truth_ratio"], "true_better") for row in rows))
    return {"model_utility": model_utility(scores)} if scores else {}


def _membership(measured: Measured, suite: Suite) -> dict[str, float]:
    holdout = suite.of_role("holdout")
    if not holdout:
        return {}
    members, others = measured.rows[suite.of_role("forget")[0].name], measured.rows[holdout[0].name]
    if not all(name in row for row in (*members, *others) for name in AUCS):  # a set of options
        return {}
    return {name: membership_auc([row[name] for row in members], [row[name] for row in others]) for name in AUCS}


def _perplexity(nll: float, num_tokens: int) -> float:
    return perplexity([nll], [num_tokens]) if num_tokens else float("inf")
