"""A mean over examples, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval.

    Attributes:
        mean: Over the examples.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """The mean and its percentile bootstrap interval, by scipy.

    It tells how much the mean would vary with other examples of the same kind; not what another training seed would
    give, which varies more.

    Args:
        values: One an example, finite.
        level: Share of resampled means inside the interval, in (0, 1).
        num_resamples: How often the examples are drawn anew.
        seed: Of the draws.

    Returns:
        The interval; of a single value or of equal ones it has no width, which then is no sign of sureness.

    Raises:
        ValueError: There is no value, or one is not finite.
        ImportError: The package `scipy` is missing.
    """
    data = np.asarray(list(values), dtype=float)
    if not len(data) or not bool(np.isfinite(data).all()):
        raise ValueError(f"an interval needs at least one value, all finite, got {data.tolist()[:5]}")
    mean = float(data.mean())
    if bool((data == data[0]).all()):
        return Interval(mean, mean, mean)
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise ImportError("intervals need the package scipy: pip install 'uoe-peft[eval]'") from error
    found = bootstrap(
        (data,),
        np.mean,
        confidence_level=level,
        n_resamples=num_resamples,
        method="percentile",
        batch=max(1, 1_000_000 // len(data)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))
