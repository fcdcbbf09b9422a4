"""Bootstrap intervals: where they must be, and how wide."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uoe_peft.evaluation.metrics import bootstrap_interval


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    interval = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap_interval(values.tolist(), level=0.5).low > interval.low


@pytest.mark.parametrize("values", [[0.25], [0.5, 0.5, 0.5]])
def test_equal_values_have_no_width(values: list[float]) -> None:
    interval = bootstrap_interval(values)
    assert interval.low == interval.mean == interval.high == values[0]


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="all finite"):
        bootstrap_interval(values)
