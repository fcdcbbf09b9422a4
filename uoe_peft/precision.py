"""Which floating-point types this machine's CPU computes in at speed: found by trying.

Flags of a CPU do not tell: libraries have paths of their own, and machines without bfloat16 arithmetic emulate it, some
sixty times slower than float32. A small product takes a few milliseconds to try.
"""

from __future__ import annotations

import logging
import time
from functools import cache

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# A type that takes longer than this many float32 products is emulated: hardware that has it takes less than one, and
# what small products cost beside the arithmetic is no more than two or three.
_SLOW = 5.0
_REPEATS = 5


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times longer a matrix product takes on the CPU than in float32; measured once, in milliseconds.

    Args:
        dtype: A floating-point type of 16 bits or more; smaller ones are only for storage.

    Raises:
        TypeError: Another type.
    """
    if not _computes(dtype):
        raise TypeError(f"dtype must be a floating-point type of 16 bits or more, got {dtype}")
    return 1.0 if dtype == torch.float32 else _seconds(dtype) / _seconds(torch.float32)


def is_slow(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether a device computes in a type much slower than in float32; of accelerators none is held to be slow."""
    return torch.device(device).type == "cpu" and slowdown(dtype) > _SLOW


def fast_dtype(preferred: torch.dtype, device: torch.device | str = "cpu") -> torch.dtype:
    """The preferred type, or float32 where a device is slow in it."""
    return torch.float32 if is_slow(preferred, device) else preferred


def slow_compute_dtype(model: nn.Module) -> torch.dtype | None:
    """The slow type that a model's matrix products run in, under the autocast that is on; None where it is fast.

    Args:
        model: Any model; the type and place of most of its floating-point weights count.
    """
    sizes: dict[tuple[torch.dtype, str], int] = {}
    for weight in model.parameters():
        if _computes(weight.dtype) and weight.dim() > 1:
            key = weight.dtype, weight.device.type
            sizes[key] = sizes.get(key, 0) + weight.numel()
    if not sizes:
        return None
    dtype, device = max(sizes, key=lambda key: sizes[key])
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return dtype if is_slow(dtype, device) else None


def say_if_slow(model: nn.Module) -> None:
    """Log, once for a type, that a model computes in one that this machine is slow in; see `slow_compute_dtype`."""
    dtype = slow_compute_dtype(model)
    if dtype is not None:
        _say(dtype, type(model).__name__)


@cache
def _say(dtype: torch.dtype, name: str) -> None:
    logger.warning(
        "%s computes in %s, in which matrix products take %.0f times as long as in float32 on this CPU; load it with "
        "dtype=torch.float32, and train with bf16=False and fp16=False",
        *(name, str(dtype).removeprefix("torch."), slowdown(dtype)),
    )


def _computes(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _seconds(dtype: torch.dtype) -> float:
    """The quickest of a few products, as large as one expert's for a short batch."""
    left, right = _ones(64, 128, dtype), _ones(128, 128, dtype)
    times = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine a product waits for its second thread, whatever the type
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            torch.mm(left, right)  # the first one sets up kernels
            for _ in range(_REPEATS):
                start = time.perf_counter()
                torch.mm(left, right)
                times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def _ones(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(rows, columns).to(dtype)
