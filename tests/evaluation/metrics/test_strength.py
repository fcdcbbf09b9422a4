"""The search over scales against functions whose answer is known."""

from __future__ import annotations

import math

import pytest

from uoe_peft.evaluation.metrics import greatest_scale, least_scale


def test_a_falling_measure_is_bisected_to_its_crossing() -> None:
    asked: list[float] = []

    def measure(scale: float) -> float:
        asked.append(scale)
        return 1 - scale**2

    found = least_scale(measure, 0.5, tolerance=1 / 256)
    assert found.scale is not None
    assert math.sqrt(0.5) <= found.scale <= math.sqrt(0.5) + 1 / 256
    assert found.monotone
    assert found.curve == tuple((scale, 1 - scale**2) for scale in sorted(asked))
    assert len(asked) == len(set(asked)) <= 5 + 6


def test_the_greatest_scale_that_keeps_enough() -> None:
    found = greatest_scale(lambda scale: 1 - scale**3, 0.95, tolerance=1 / 128)
    exact = 0.05 ** (1 / 3)
    assert found.scale is not None
    assert exact - 1 / 128 <= found.scale <= exact


def test_a_relapse_is_not_stepped_over() -> None:
    """Good at 0.5, bad at 0.75, good at 1: only what is good all the way counts."""
    values = {0.0: 0.0, 0.25: 0.9, 0.5: 0.95, 0.75: 0.1, 1.0: 0.97}

    def measure(scale: float) -> float:
        return values.get(scale, 0.9 if scale < 0.7 else 0.2)

    upper = least_scale(lambda scale: -measure(scale), -0.85, tolerance=0.2)
    assert not upper.monotone
    assert upper.scale is not None
    assert upper.scale > 0.75
    kept = greatest_scale(lambda scale: 1 - values.get(scale, 0.1), 0.85, tolerance=0.2)
    assert kept.scale is not None
    assert kept.scale < 0.25


def test_ends_that_do_and_do_not_do() -> None:
    assert least_scale(lambda scale: 1.0, 0.5).scale is None
    assert least_scale(lambda scale: 0.0, 0.5).scale == 0.0
    assert greatest_scale(lambda scale: 0.0, 0.5).scale is None
    assert greatest_scale(lambda scale: 1.0, 0.5).scale == 1.0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"scale 0\.0 is not a number"):
        least_scale(lambda scale: math.nan, 0.5)
    with pytest.raises(ValueError, match="num_grid must be at least 2"):
        least_scale(lambda scale: scale, 0.5, num_grid=1)
    with pytest.raises(ValueError, match="tolerance above 0"):
        greatest_scale(lambda scale: scale, 0.5, tolerance=0.0)
