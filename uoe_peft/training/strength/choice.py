"""The choice of a strength: by bisection, for one of two goals, and said in figures for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from uoe_peft.evaluation.metrics.strength import greatest_scale, least_scale
from uoe_peft.training.strength.options import Goal, Metric

Point = Mapping[str, float]
"""What was measured at a scale, by "forget", "retain" and "forget_relearned"."""


@dataclass(frozen=True)
class StrengthChoice:
    """The part of the trained change that was chosen, and what is known of it.

    Attributes:
        scale: In (0, 1]; 1 is what was trained, also where no scale meets the goal.
        meets_goal: Whether the scale does what was asked for.
        goal: What was asked for.
        metric: What was measured.
        forget_limit: The most that may be left of the forget set; None where none was named.
        retain_share: The share of the base's measure of the retain set that must be left.
        curve: What was measured, by scale, ascending; 0 is the base.
    """

    scale: float
    meets_goal: bool
    goal: Goal
    metric: Metric
    forget_limit: float | None
    retain_share: float
    curve: Mapping[float, Point]

    @property
    def retain_kept(self) -> float | None:
        """Share of the base's measure of the retain set that is left; None where it was not measured."""
        return self._share(self.scale)

    @property
    def forget_left(self) -> float:
        """What is left of the forget set: after relearning, if that was measured."""
        return forgotten(self.curve[self.scale])

    def logs(self) -> list[dict[str, float]]:
        """A record for each scale that was tried, and one for the choice."""
        tried = [
            {"calibration_scale": scale, **{f"calibration_{name}": value for name, value in point.items()}}
            for scale, point in self.curve.items()
        ]
        chosen = {"strength_scale": self.scale, "strength_meets_goal": float(self.meets_goal)}
        chosen["strength_forget"] = self.forget_left
        if self.retain_kept is not None:
            chosen["strength_retain_share"] = self.retain_kept
        return [*tried, chosen]

    def summary(self) -> str:
        """The choice in a few sentences: how far both limits are met, and what it costs."""
        said = [f"Strength {self.scale:.3g} of what was trained, chosen by {self.metric} on validation rows."]
        if not self.meets_goal:
            said[0] = f"No part of what was trained does what calibrate={self.goal!r} asks for: it stays as trained."
        limit = "no limit was named" if self.forget_limit is None else f"limit {self.forget_limit:.3g}"
        said.append(f"Forget set: {self._row(forgotten)}; {limit}.")
        if self.retain_kept is not None:
            said.append(
                f"Retain set: {self._row(lambda point: point['retain'])}; {self.retain_kept:.1%} of the base's is "
                f"kept, asked for {self.retain_share:.1%}."
            )
        if self.scale < 1:
            said.append(self._warning())
        return " ".join(said)

    def _row(self, value: Callable[[Point], float]) -> str:
        at = {"": self.scale, "as trained ": 1.0, "base ": 0.0}
        return ", ".join(f"{name}{value(self.curve[scale]):.3f}" for name, scale in at.items())

    def _share(self, scale: float) -> float | None:
        point, base = self.curve[scale], self.curve[0.0]
        if "retain" not in point:
            return None
        return point["retain"] / base["retain"] if base["retain"] else 1.0

    def _warning(self) -> str:
        if "forget_relearned" in self.curve[0.0]:
            return "The forget set's figures are those after a short relearning: a weaker forgetting is easier to undo."
        return (
            "A weaker forgetting is easier to undo: a few steps of relearning bring back more of it than of the full "
            "strength; calibrate_against='relearning' measures how much."
        )


def forgotten(point: Point) -> float:
    """The figure of the forget set that counts: after relearning, if that was measured."""
    return point.get("forget_relearned", point["forget"])


def choose_scale(
    measure: Callable[[float], Point], *, goal: Goal, metric: Metric, forget_limit: float | None, retain_share: float
) -> StrengthChoice:
    """The least scale that forgets enough, or the greatest that keeps enough; 1 where there is none above 0.

    Args:
        measure: Scale -> what the model then knows; called once for each scale.
        goal: "forget" needs `forget_limit`, "retain" a measure of retain rows.
        metric: Name of what is measured, for the record.
        forget_limit: See `StrengthChoice`.
        retain_share: Likewise.

    Raises:
        ValueError: A measure is not a number.
    """
    points: dict[float, Point] = {}

    def at(scale: float) -> Point:
        if scale not in points:
            points[scale] = measure(scale)
        return points[scale]

    if goal == "forget":
        assert forget_limit is not None
        found = least_scale(lambda scale: forgotten(at(scale)), forget_limit).scale
    else:
        floor = retain_share * at(0.0)["retain"]
        found = greatest_scale(lambda scale: at(scale)["retain"], floor).scale
    # At 0 the adapter does nothing: nobody trained it for that.
    return StrengthChoice(
        scale=found or 1.0,
        meets_goal=bool(found),
        goal=goal,
        metric=metric,
        forget_limit=forget_limit,
        retain_share=retain_share,
        curve={scale: points[scale] for scale in sorted(points)},
    )
