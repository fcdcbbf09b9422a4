"""Several processes: what they must agree on to the bit, the first one says; and which engines they may run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast, broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.tuner import UOELayer

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


def check_engine(model: nn.Module, accelerator: Accelerator) -> None:
    """Refuse to train edits of single experts where weights are split in a way that no edit can read.

    Args:
        model: The model to train; without an edit of single experts nothing is refused.
        accelerator: Of the trainer; knows what a launcher or the arguments have chosen.

    Raises:
        UnsupportedModelError: DeepSpeed ZeRO-3, or FSDP version 1; or the model is sharded already and this version of
            transformers would train another adapter in each process.
    """
    reason = None
    if not any(isinstance(module, UOELayer) for module in model.modules()):
        return
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        reason = "DeepSpeed ZeRO-3 partitions every weight, and gathers none for an edit of a single expert"
    elif accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        reason = "FSDP version 1 flattens weights, and is not supported"
    elif getattr(model, "is_distributed_loading_by_transformers", False) and not hasattr(
        Trainer, "_sync_replicated_trainable_parameters"
    ):
        reason = "this version of transformers would train another adapter in each process (upgrade to 5.23)"
    if reason:
        raise UnsupportedModelError(
            f"{reason}; use fsdp=True with fsdp_config={{'version': 2, ...}}, or load the model with "
            "distributed_config=DistributedConfig(fsdp_size=...)"
        )
