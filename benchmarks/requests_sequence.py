"""Requests one after another, an adapter each, and what withdrawing each of them leaves; or one for all of them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, Literal

from datasets import concatenate_datasets
from requests_ground import Ground, Row

from uoe_peft.requests import add_request, withdrawn

Known = Literal["refusals and facts", "refusals", "moments", "nothing"]


def one_after_another(ground: Ground, seed: int, done: Container[str], *, known: Known, folder: str) -> Iterator[Row]:
    """A row after each request, one with the second one's adapter deleted, and one with each other one switched off.

    Args:
        ground: The requests.
        seed: Of training.
        done: Steps that were run before, whose adapters are in their folder.
        known: What training reads of earlier requests: their questions with refusals, and their facts with their
            adapters off; the refusals alone; their moments at the new expert, and no text; or nothing.
        folder: Where adapters are saved, in the output directory.
    """
    place_of = ground.output_dir / f"{folder}_{seed}"
    for place, topic in enumerate(ground.names):
        if topic in done and (place_of / topic).is_dir():
            continue
        earlier = ground.names[:place]
        model = ground.load_with(place_of, earlier)
        kept = ground.kept(after=place, earlier=earlier if "refusals" in known else ())
        config = ground.config(model, ground.requests[topic], kept)
        options: dict[str, Any] = {}
        if known == "refusals and facts":
            options["earlier"] = {name: ground.requests[name] for name in earlier}
        if known == "moments":
            options["retain_projection"] = 1.0
        model = add_request(model, config, topic)
        if known == "moments" and earlier:
            moments = ground.moments(config.target_experts)  # type: ignore[arg-type]
            options["earlier_moments"] = {name: moments[name] for name in earlier}
        found = ground.train(model, ground.requests[topic], kept, seed=seed, **options)
        model.save_pretrained(place_of, selected_adapters=[topic])
        yield ground.report(topic, model, **found)
    gone = ground.names[1]
    step = f"{gone} withdrawn"
    if step not in done:
        model = ground.load_with(place_of, ground.names)
        model.delete_adapter(gone)
        model.base_model.set_adapter([topic for topic in ground.names if topic != gone])
        yield ground.report(step, model)
    model = ground.load_with(place_of, ground.names)
    for topic in ground.names:
        step = f"{topic} off"
        if step not in done and topic != gone:
            with withdrawn(model, topic):
                yield ground.report(step, model)


def union(ground: Ground, seed: int) -> Iterator[Row]:
    """One adapter on the rows of all five requests, with as many steps as the five have together."""
    rows = concatenate_datasets(list(ground.requests.values()))
    model = ground.load()
    model = add_request(model, ground.config(model, rows, ground.retain), "union")
    found = ground.train(model, rows, ground.retain, seed=seed, max_steps=len(ground.names) * ground.recipe.steps)
    yield ground.report("union", model, **found)
