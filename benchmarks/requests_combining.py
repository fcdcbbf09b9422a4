"""Adapters trained on the base, each without the others: chosen per prompt, all on, or combined to one."""

from __future__ import annotations

from collections.abc import Container, Iterator
from statistics import fmean
from typing import Any

import torch
from datasets import concatenate_datasets
from requests_ground import Ground, Row, rouge
from sklearn.metrics import roc_auc_score

from uoe_peft import PromptGate, UOEConfig
from uoe_peft.requests import add_regression_mean, add_request, generate_gated

COMBINATIONS: dict[str, dict[str, Any]] = {
    "sum": {"combination_type": "linear"},
    "mean": {"combination_type": "linear"},
    "TIES": {"combination_type": "ties", "density": 0.5},
    "DARE, TIES": {"combination_type": "dare_ties", "density": 0.5},
    "DARE": {"combination_type": "dare_linear", "density": 0.5},
    "magnitude pruned": {"combination_type": "magnitude_prune", "density": 0.5},
}


def apart(ground: Ground, seed: int, done: Container[str]) -> Iterator[Row]:
    """Adapters of the base, each trained to keep all that the others forget; then chosen per prompt, and together."""
    folder = ground.output_dir / f"apart_{seed}"
    for topic in ground.names:
        step = f"{topic} alone"
        if step in done and (folder / topic).is_dir():
            continue
        model, kept = ground.load(), ground.kept_apart(topic)
        model = add_request(model, ground.config(model, ground.requests[topic], kept), topic)
        found = ground.train(model, ground.requests[topic], kept, seed=seed)
        model.save_pretrained(folder)  # in a folder of the adapter's name
        yield ground.report(step, model, **found)
    model = ground.load_with(folder, ground.names)
    if f"gate without {ground.names[1]}" not in done:
        yield from _gated(ground, model)
    if "all on" not in done:
        yield ground.report("all on", model)
    yield from _combined(ground, model, done)


def one_expert(ground: Ground, seed: int, done: Container[str]) -> Iterator[Row]:
    """All five requests as one forget set, split by its column "topic", an adapter of one and the same expert each.

    SPUNGE (https://arxiv.org/abs/2406.11780): none keeps what the others forget. Then combined.
    """
    folder = ground.output_dir / f"one_expert_{seed}"
    rows = concatenate_datasets(list(ground.requests.values()))
    config: UOEConfig | None = None
    for topic in ground.names:
        step = f"{topic} alone"
        if step in done and (folder / topic).is_dir():
            continue
        model = ground.load()
        config = config or ground.config(model, rows, ground.retain)
        model = add_request(model, config, topic)
        own = rows.filter(lambda row, topic=topic: row["topic"] == topic, keep_in_memory=True)
        found = ground.train(model, own, ground.retain, seed=seed)
        model.save_pretrained(folder)
        yield ground.report(step, model, **found)
    yield from _combined(ground, ground.load_with(folder, ground.names), done)


def _combined(ground: Ground, model: Any, done: Container[str]) -> Iterator[Row]:
    """A row for each way to make one adapter of the five."""
    for name, options in COMBINATIONS.items():
        if name in done:
            continue
        torch.manual_seed(0)  # DARE draws
        number = len(ground.names)
        weight = 1 / number if name == "mean" else 1.0
        model.base_model.add_weighted_adapter(list(ground.names), [weight] * number, "combined", **options)
        yield _alone(ground, model, name)
    experts = sorted({pair for topic in ground.names for pair in model.peft_config[topic].target_experts})
    moments = ground.moments(experts)
    retain = moments.pop("retain")
    for name, kept in (("regression mean", None), ("regression mean with retain moments", retain)):
        if name not in done:
            add_regression_mean(model, ground.names, moments, "combined", retain=kept, ridge=1e-2)
            yield _alone(ground, model, name)


def _alone(ground: Ground, model: Any, step: str) -> Row:
    """The scores with the adapter "combined" alone, which then is deleted."""
    model.base_model.set_adapter(["combined"])
    row = ground.report(step, model)
    model.base_model.set_adapter(list(ground.names))
    model.delete_adapter("combined")
    return {**row, "experts": {}}


def _gated(ground: Ground, model: Any) -> Iterator[Row]:
    """Answers with the adapter that each prompt needs, on prompts that the gate was not fitted on."""
    unseen = {name: set(rows["prompt"]) for name, rows in ground.asked.items()}
    fitted = {
        name: rows.filter(lambda row, own=unseen[name]: row["prompt"] not in own, keep_in_memory=True)
        for name, rows in ground.requests.items()
    }
    gate = PromptGate.fit(model, fitted, ground.retain, processing_class=ground.tokenizer)
    yield {"step": "gate: right choices", **_choices(ground, model, gate)}
    yield {"step": "gate: answers", **_answers(ground, model, gate)}
    gone = ground.names[1]
    yield {"step": f"gate without {gone}", **_answers(ground, model, gate.without(gone))}


def _choices(ground: Ground, model: Any, gate: PromptGate) -> Row:
    """Shares of prompts that get the right adapter; areas under the ROC: any request against none, each against all."""
    scores, right = {}, {}
    for name, rows in ground.asked.items():
        inputs = _prompts(ground, rows)
        scores[name] = gate.scores(model, **inputs)
        wanted = "__base__" if name == "retain" else name
        right[name] = round(fmean(own == wanted for own in gate.choose(model, **inputs)), 4)
    every = torch.cat(list(scores.values()))
    owners = [name for name, rows in scores.items() for _ in rows]
    area = _area(every.max(dim=1).values, [owner != "retain" for owner in owners])
    areas = {
        name: _area(every[:, place], [owner == name for owner in owners]) for place, name in enumerate(gate.adapters)
    }
    return {**right, "area": area, "areas": areas}


def _area(scores: torch.Tensor, labels: list[bool]) -> float:
    return round(float(roc_auc_score(labels, scores.tolist())), 4)


def _answers(ground: Ground, model: Any, gate: PromptGate) -> Row:
    found = {}
    for name, rows in ground.asked.items():
        inputs = _prompts(ground, rows)
        ids = generate_gated(model, gate, **inputs, max_new_tokens=ground.longest, do_sample=False)
        answers = ground.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found[name] = rouge([answer.strip() for answer in answers], rows)
    return found


def _prompts(ground: Ground, rows: Any) -> dict[str, Any]:
    batch = ground.tokenizer(list(rows["prompt"]), padding=True, padding_side="left", return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
