"""What several processes must agree on to the bit: the first one says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

T = TypeVar("T")


def from_first_process(value: T) -> T:
    """The first process's value, on all of them; all must come here together, each with a value of its own.

    Args:
        value: Anything that can be pickled.
    """
    PartialState()  # accelerate asks it whether there are other processes
    said: T = broadcast_object_list([value])[0]
    return said


def said_by_first_process(ask: Callable[[], T]) -> T:
    """What the first process answers, on all of them; only it is asked, the others wait.

    Args:
        ask: Gives anything that can be pickled; must not talk to other processes.
    """
    answer = ask() if PartialState().is_main_process else None
    said: T = broadcast_object_list([answer])[0]
    return said


def masks_from_first_process(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first process's bool tensors, on all of them; names, shapes and devices are those of each process."""
    PartialState()
    return {name: broadcast(mask.to(torch.uint8).contiguous()).bool() for name, mask in masks.items()}
