"""Times of calls that take turns in one process, so that a slow moment of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Name = TypeVar("Name")


def seconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes, the device's queue included."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def interleaved(calls: Mapping[Name, Callable[[], object]], *, rounds: int, device: str) -> dict[Name, list[float]]:
    """Seconds of each call in each round; a round before them, which allocates, is not timed."""
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for round_idx in range(rounds + 1):
        for name, call in calls.items():
            taken = seconds(call, device)
            if round_idx:
                times[name].append(taken)
    return times


def median_ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(mine / theirs for mine, theirs in zip(own, other, strict=True))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
