"""How strong an adapter may be without harm, or must be to forget (UWC, https://arxiv.org/abs/2406.09179).

A weaker adapter is nearly always a better bargain of forgetting and keeping. It is a shallower forgetting, too: a few
steps of relearning bring it back sooner. Attack the model at the chosen scale before trusting it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from uoe_peft.evaluation.attacks.result import Score
from uoe_peft.evaluation.metrics import greatest_scale, least_scale
from uoe_peft.evaluation.switching import scaled


@dataclass(frozen=True)
class Calibration:
    """A chosen scale, and the curve that led to it.

    Attributes:
        scale: What every delta should be multiplied with; None where no scale will do.
        goal: "retain": the greatest scale that keeps enough; "forget": the least that forgets enough.
        metric: The measure that the goal is about, such as "retain_rouge_l_recall".
        limit: The value that the measure must reach.
        curve: Everything that was measured, by rising "scale".
        monotone: Whether the measure only fell or only rose along the curve. Where not, the scale is still safe as far
            as was looked: all measured scales on its good side meet the limit.
    """

    scale: float | None
    goal: str
    metric: str
    limit: float
    curve: tuple[Mapping[str, float], ...]
    monotone: bool


def calibrate_scale(
    model: PeftModel,
    score: Score,
    *,
    retain_share: float | None = None,
    forget_limit: float | None = None,
    metric: str | None = None,
    tolerance: float = 1 / 32,
) -> Calibration:
    """The scale of an adapter at which it keeps, or forgets, as much as asked; the model is left as it was.

    `with scaled(model, calibration.scale)` then is the calibrated model. Choose the scale on rows that the evaluation
    does not use.

    Args:
        model: A model with an adapter that is on and not merged.
        score: Measures forgetting and retention; `SuiteScore(suite, tokenizer)` makes one of validation rows.
        retain_share: Choose the greatest scale that keeps this share of the base model's measure of the retain set.
        forget_limit: Or: choose the least scale at which the measure of the forget set is down to this.
        metric: Which of the score's measures, without the set's name, such as "probability"; None: its first.
        tolerance: How near the scale is to the next measured one that will not do.

    Returns:
        The scale, in [0, 1], and the curve.

    Raises:
        ValueError: Not exactly one goal, one out of range, a measure that the score does not have; or the adapter
            cannot be scaled.
    """
    if (retain_share is None) == (forget_limit is None):
        raise ValueError(f"pass either retain_share or forget_limit, got {retain_share} and {forget_limit}")
    if retain_share is not None and not 0 < retain_share <= 1:
        raise ValueError(f"retain_share must be in (0, 1], got {retain_share}")
    points: dict[float, dict[str, float]] = {}

    def measured(scale: float) -> dict[str, float]:
        if scale not in points:
            with scaled(model, scale):
                points[scale] = {name: float(value) for name, value in score(model).items()}
        return points[scale]

    base = measured(0.0)
    goal = "forget" if retain_share is None else "retain"
    name = _named(base, goal, metric)
    if retain_share is None:
        assert forget_limit is not None
        limit = forget_limit
        found = least_scale(lambda scale: measured(scale)[name], limit, tolerance=tolerance)
    else:
        limit = retain_share * base[name]
        found = greatest_scale(lambda scale: measured(scale)[name], limit, tolerance=tolerance)
    curve = tuple({"scale": scale, **points[scale]} for scale in sorted(points))
    return Calibration(found.scale, goal, name, limit, curve, found.monotone)


def _named(scores: Mapping[str, Any], goal: str, metric: str | None) -> str:
    names = [name for name in scores if name.startswith(f"{goal}_") and metric in (None, name.removeprefix(f"{goal}_"))]
    if not names:
        raise ValueError(f"the score has no {metric or 'measure'} of the {goal} set; it has {sorted(scores)}")
    return names[0]
