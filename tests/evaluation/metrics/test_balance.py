"""Forgetting and retaining as one number."""

from __future__ import annotations

import math

import pytest

from uoe_peft.evaluation.metrics import forget_retain_balance


def test_by_hand() -> None:
    half = math.log(2)
    assert forget_retain_balance(half, 0.0) == pytest.approx(2 * 0.5 / 1.5)
    assert forget_retain_balance(half, half) == pytest.approx(0.5)


@pytest.mark.parametrize(("forget", "retain"), [(0.0, 0.0), (50.0, 800.0), (math.inf, 0.0), (1.0, math.nan)])
def test_one_side_alone_is_nothing(forget: float, retain: float) -> None:
    assert forget_retain_balance(forget, retain) < 1e-12


def test_forgetting_all_and_keeping_all_is_one() -> None:
    assert forget_retain_balance(50.0, 0.0) == pytest.approx(1.0)
