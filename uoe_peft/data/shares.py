"""A set's batches shared out to processes, and what each of them has found put together again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one process reads of a set: every `count`-th batch, from the one at `rank` on.

    All methods that talk to other processes must be called in each of them. A process that is alone talks to nobody.

    Attributes:
        rank: Number of this process, 0 to `count - 1`.
        count: Number of processes that share the set.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Share:
        """The share of this process: everything where processes run one model together, and must do so in step.

        Args:
            model: The model that reads the batches.
        """
        if not (dist.is_available() and dist.is_initialized()) or is_split(model):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def left_out_before(self, index: int) -> int:
        """How many batches others read between this process's own batch of this index and the one before it."""
        return self.count - 1 if index else self.rank

    def gathered(self, value: T) -> list[T]:
        """Every process's value, by rank.

        Args:
            value: Anything that can be pickled.
        """
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return cast(list[T], values)

    def total(self, own: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each of them; shape, dtype and device are those of `own`."""
        if self.count == 1:
            return own
        total = own.to(_meeting_place(own.device), copy=True)
        dist.all_reduce(total)
        return total.to(own.device)

    def check_same(self, value: object, *, name: str) -> None:
        """Whether every process reads the same set in the same way.

        Args:
            value: What tells sets and ways apart.
            name: What messages call the set.

        Raises:
            ValueError: They do not.
        """
        values = self.gathered(value)
        other = next((rank for rank, said in enumerate(values) if said != values[0]), None)
        if other is not None:
            raise ValueError(
                f"processes 0 and {other} read different {name} sets, or the same in different ways; pass the whole "
                "set and the same options in every process: its batches are shared out here"
            )

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Inside the context an error of one process is an error of all, so that nobody waits for one that has gone.

        Raises:
            RuntimeError: Another process has failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        said = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = next((rank for rank, message in enumerate(said) if message is not None), None)
        if failed is not None:
            raise RuntimeError(f"process {failed} of {self.count} has failed: {said[failed]}")


def is_split(model: nn.Module) -> bool:
    """Whether processes hold parts of a model's weights, and so run every pass together."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    # DeepSpeed marks what it has partitioned by an attribute.
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def _meeting_place(device: torch.device) -> torch.device:
    """Where the processes' backend can reach a tensor: most of those for accelerators know no CPU."""
    backends = dict(entry.split(":") for entry in dist.get_backend_config().split(","))
    accelerator = torch.accelerator.current_accelerator()
    if device.type in backends or accelerator is None:
        return device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
