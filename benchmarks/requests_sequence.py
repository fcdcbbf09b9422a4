"""Requests one after another: an adapter each, and what withdrawing each of them leaves."""

from __future__ import annotations

from collections.abc import Iterator
from time import process_time
from typing import Any

from requests_ground import REQUESTS, WITHDRAWN, Ground, Recipe, load

from uoe_peft.requests import add_request, withdrawn


def one_after_another(
    ground: Ground, recipe: Recipe, seed: int, *, with_earlier: bool = True, withdrawable: bool = True
) -> Iterator[dict[str, Any]]:
    """A row after each request, one for each of them withdrawn, and one with the second one's adapter deleted.

    Args:
        ground: The requests.
        recipe: How each is trained.
        seed: Of training.
        with_earlier: Whether the text of earlier requests is there: their refusals are kept.
        withdrawable: Whether their facts are kept, too, with their adapters off.
    """
    model: Any = load()
    yield ground.report("base", model)
    for place, topic in enumerate(REQUESTS):
        started = process_time()
        earlier = REQUESTS[:place] if with_earlier else ()
        kept = ground.kept(after=place, earlier=earlier)
        model = add_request(model, ground.config(model, ground.requests[topic], kept), topic)
        facts = {name: ground.requests[name] for name in earlier} if withdrawable else {}
        rate = recipe.later_learning_rate if place else None
        trainer = ground.train(model, ground.requests[topic], kept, recipe, seed=seed, rate=rate, earlier=facts)
        choice = trainer.strength_choice
        strength = 1.0 if choice is None else choice.scale
        yield ground.report(topic, model, strength=strength, seconds=round(process_time() - started, 1))
    for topic in REQUESTS:
        if topic != WITHDRAWN:
            with withdrawn(model, topic):
                yield ground.report(f"{topic} off", model)
    model.delete_adapter(WITHDRAWN)
    model.base_model.set_adapter([topic for topic in REQUESTS if topic != WITHDRAWN])
    yield ground.report(f"{WITHDRAWN} withdrawn", model)
