"""How strong should an adapter be? A search over its scale, for any measure of the scaled model.

Forgetting need not grow steadily with the scale, nor damage: nothing here takes that for granted. A coarse grid is
measured first and bisection works between two neighbours of it; what is returned is safe as far as was looked: *every*
measured scale on the good side of it meets the condition. A dip between two measured scales goes unseen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class ScaleSearch:
    """What a search over scales found.

    Attributes:
        scale: The scale; None where no measured scale will do.
        curve: `(scale, measure)` of all scales that were measured, by rising scale.
        monotone: Whether the measure only fell or only rose along the curve.
    """

    scale: float | None
    curve: tuple[tuple[float, float], ...]
    monotone: bool


def least_scale(
    measure: Callable[[float], float], limit: float, *, tolerance: float = 1 / 32, num_grid: int = 5
) -> ScaleSearch:
    """The least scale in [0, 1] at which a measure, such as what is left of the forget set, is down to a limit.

    Every measured scale from there to 1 is at or below the limit, too; None where that does not hold for 1 itself.

    Args:
        measure: The measure as a function of the scale.
        limit: Greatest value that will do.
        tolerance: Bisection ends when the next lower measured scale is this near.
        num_grid: Scales that are measured first, evenly from 0 to 1; at least 2.

    Returns:
        The scale, and the curve that led to it.

    Raises:
        ValueError: An argument is out of range, or a measure is not a number.
    """
    return _search(measure, lambda value: value <= limit, from_above=True, tolerance=tolerance, num_grid=num_grid)


def greatest_scale(
    measure: Callable[[float], float], floor: float, *, tolerance: float = 1 / 32, num_grid: int = 5
) -> ScaleSearch:
    """The greatest scale in [0, 1] up to which a measure, such as what is kept, stays at or above a floor.

    Every measured scale from 0 to there is at or above the floor, too; None where that does not hold for 0 itself.
    Arguments and errors as in `least_scale`.
    """
    return _search(measure, lambda value: value >= floor, from_above=False, tolerance=tolerance, num_grid=num_grid)


def _search(
    measure: Callable[[float], float],
    meets: Callable[[float], bool],
    *,
    from_above: bool,
    tolerance: float,
    num_grid: int,
) -> ScaleSearch:
    if num_grid < 2 or not tolerance > 0:
        raise ValueError(f"num_grid must be at least 2 and tolerance above 0, got {num_grid} and {tolerance}")
    curve = {step / (num_grid - 1): math.nan for step in range(num_grid)}
    for scale in curve:
        curve[scale] = _measured(measure, scale)
    while True:
        good, bad = _border(curve, meets, from_above=from_above)
        if good is None or bad is None or abs(good - bad) <= tolerance:
            break
        middle = (good + bad) / 2
        curve[middle] = _measured(measure, middle)
    points = tuple(sorted(curve.items()))
    steps = [after - before for (_, before), (_, after) in pairwise(points)]
    monotone = all(step <= 0 for step in steps) or all(step >= 0 for step in steps)
    return ScaleSearch(scale=good, curve=points, monotone=monotone)


def _border(
    curve: dict[float, float], meets: Callable[[float], bool], *, from_above: bool
) -> tuple[float | None, float | None]:
    """The last scale that meets the condition, coming from the end where it should; and the first that does not."""
    good = None
    for scale in sorted(curve, reverse=from_above):
        if not meets(curve[scale]):
            return good, scale
        good = scale
    return good, None


def _measured(measure: Callable[[float], float], scale: float) -> float:
    value = float(measure(scale))
    if math.isnan(value):
        raise ValueError(f"the measure at scale {scale} is not a number")
    return value
