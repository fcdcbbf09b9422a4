"""At which rate a method should train: three each, on the first request, by rows of which nothing else is told.

Those are the 80 rows of the retain set on which choices are made, and what of the first request is not asked. Where two
rates forget alike, the better one keeps more; so the best is that with the greatest difference of the two recalls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Container, Iterator
from typing import Any

from requests_ground import Ground, Row
from requests_rivals import lora_request, ssu_request
from transformers import AutoModelForCausalLM, set_seed

from uoe_peft.requests import add_request

RATES = {
    "UOE": (5e-3, 1e-2, 2e-2),
    "all parameters": (2e-4, 5e-4, 1e-3),
    "orthogonal LoRA": (1e-3, 2e-3, 4e-3),
    "SSU": (1e-4, 5e-4, 2e-3),
}


def rates(ground: Ground, seed: int, done: Container[str]) -> Iterator[Row]:
    """A row for each method and rate: what is left of the first request, and of the retain set."""
    first = ground.names[0]
    asked = set(ground.asked[first]["prompt"])
    unasked = ground.requests[first].filter(lambda row: row["prompt"] not in asked, keep_in_memory=True)
    for method, rate in ((method, rate) for method, own in RATES.items() for rate in own):
        step = f"{method}, rate {rate:g}"
        if step not in done:
            set_seed(seed)
            model, found = _first_request(ground, method, seed=seed, rate=rate)
            recalls = {first: ground.recall(model, unasked), "retain": ground.recall(model, ground.chosen_on)}
            yield {"step": step, **recalls, **found}


def _first_request(ground: Ground, method: str, *, seed: int, rate: float) -> tuple[Any, Row]:
    model, (first, forget) = ground.load(), next(iter(ground.requests.items()))
    match method:
        case "orthogonal LoRA":
            return lora_request(ground, model, 0, seed=seed, rate=rate)
        case "SSU":
            return model, ssu_request(ground, model, forget, seed=seed, rate=rate)
    kept = ground.kept(after=0)
    if method == "UOE":
        model = add_request(model, ground.config(model, forget, kept), first)
        return model, ground.train(model, forget, kept, seed=seed, learning_rate=rate)
    found = ground.train(model, forget, kept, seed=seed, learning_rate=rate)
    with tempfile.TemporaryDirectory() as folder:  # what was trained calls the old
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval(), found
