"""What an attack asks of a score, and what it reports.

An attack knows no metric: it changes a model, or how it is asked, and has a *score* measure forgetting and retention
before and after. So every attack works with every suite, and all models are attacked with the same budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from peft import PeftModel
from transformers import PreTrainedModel

CausalLM = PreTrainedModel | PeftModel
Scores = Mapping[str, float]
Transform = Callable[[str], str]
FORGET = "forget"
"""What the name of every measure of the forget set begins with, as in "forget_rouge": higher is more remembered."""


class Score(Protocol):
    """Measures forgetting and retention of whatever model it is given.

    It is not always given the model that the attack was given: some attacks hand over a copy, in float32 or wrapped
    once more by PEFT. A score leaves the model as it was.
    """

    def __call__(self, model: CausalLM, *, prompts: Transform | None = None, column: str | None = None) -> Scores:
        """Ask the model.

        Args:
            model: The model.
            prompts: Applied to the text of every question of both sets before it is tokenised; of a conversation, to
                the content of the last user turn before the answer. Answers stay as they are. None: the plain question.
            column: Where the questions are read from in place of the usual column; a set without this column is asked
                as usual. A score must raise ValueError if neither set has it. None: the usual column.

        Returns:
            Means by name, all finite; of the forget set as "forget_...", of the retain set as "retain_...". The same
            names at every call.
        """
        ...


@dataclass(frozen=True)
class AttackResult:
    """Forgetting and retention before and after an attack.

    Attributes:
        name: Name of the attack.
        before: Scores of the model as it was given.
        after: Scores under the attack; the function of an attack with a curve says which of its points these are.
        curve: Scores along the attack's budget, each with the place on it (such as "step").
        settings: What the attack was run with, as plain JSON.
    """

    name: str
    before: Scores
    after: Scores
    curve: Sequence[Scores] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {
            "name": self.name,
            "before": dict(self.before),
            "after": dict(self.after),
            "curve": [dict(point) for point in self.curve],
            "settings": dict(self.settings),
        }


def measured(
    score: Score, model: CausalLM, *, prompts: Transform | None = None, column: str | None = None
) -> dict[str, float]:
    """What a score says of a model, as plain floats.

    Raises:
        ValueError: It measures nothing of the forget set, or a value is not finite.
    """
    asked = {name: value for name, value in {"prompts": prompts, "column": column}.items() if value is not None}
    scores = {name: float(value) for name, value in score(model, **asked).items()}  # type: ignore[arg-type]
    if not any(name.startswith(FORGET) for name in scores):
        raise ValueError(f'score gave {sorted(scores)}; expected at least one name that begins with "{FORGET}"')
    broken = {name: value for name, value in scores.items() if not math.isfinite(value)}
    if broken:
        raise ValueError(
            f"score gave {broken}; expected finite values: does {type(model).__name__} give finite logits?"
        )
    return scores


def baseline(score: Score, model: CausalLM, before: Scores | None) -> dict[str, float]:
    """The scores of a model as it is: those that are known already, or measured now."""
    return dict(before) if before is not None else measured(score, model)


def strongest(curve: Sequence[Scores]) -> dict[str, float]:
    """The attack at its best: whoever attacks may stop anywhere on the curve.

    Args:
        curve: Scores along the way, of equal names; at least one.

    Returns:
        Each score of the forget set: its maximum over the curve. All else, the place on the curve included: where the
        first of these scores has its (first) maximum.

    Raises:
        ValueError: The names differ along the curve.
    """
    if any(set(point) != set(curve[0]) for point in curve):
        raise ValueError(
            f"scores must have the same names at every call (and in `before`), got {[*map(sorted, curve)]}"
        )
    names = [name for name in curve[0] if name.startswith(FORGET)]
    peak = max(curve, key=lambda point: point[names[0]])
    return {**peak, **{name: max(point[name] for point in curve) for name in names}}
