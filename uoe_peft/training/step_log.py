"""What is logged of a step: when, averaged over what, and whether training may go on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState

from uoe_peft.data import Batch
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.routing_shift import selected_experts, selection_overlap
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.objective.reference import Reference

# Where the log has one entry an epoch.
_STEPS_BETWEEN_LOOKS = 10


def is_logged_step(args: UnlearningConfig, state: TrainerState, *, num_epochs: float) -> bool:
    """Whether the step that runs now goes into the log; of an epoch with one entry, every tenth does."""
    step, interval = state.global_step + 1, max(int(state.logging_steps or 1), 1)
    match args.logging_strategy:
        case "steps":
            return step % interval == 0 or (step == 1 and args.logging_first_step)
        case "epoch":
            steps_an_epoch = max(1, round(state.max_steps / num_epochs))
            return step % _STEPS_BETWEEN_LOOKS == 0 or step % steps_an_epoch == 0
        case _:
            return False


def mean_over_processes(values: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Scalars by name -> their means. One exchange between processes, one wait for the device, for all together."""
    gathered = accelerator.gather(
        torch.stack([value.float().to(accelerator.device) for value in values.values()])[None]
    )
    return dict(zip(values, gathered.mean(dim=0).tolist(), strict=True))


def check_finite(
    losses: Mapping[str, float], batches: Mapping[str, Batch], args: UnlearningConfig, *, step: int
) -> None:
    """Refuse to go on with a model that has diverged.

    Args:
        losses: "forget", "alternative", "retain", "anchor": terms of the loss.
        batches: What they were computed on, by role.
        args: Names the losses.
        step: The step that runs now, from 1.

    Raises:
        FloatingPointError: A term is NaN or infinite.
    """
    said = {
        "forget": f"forget loss ({args.forget_loss})",
        "alternative": "loss of the alternative answers",
        "retain": f"retain loss ({args.retain_loss})",
        "anchor": "router anchor",
    }
    for name, value in losses.items():
        if not math.isfinite(value):
            rows = batches["retain" if name == "retain" else "forget"]["index"].tolist()
            raise FloatingPointError(
                f"step {step}: the {said[name]} is {value} on the rows {rows}; the model has diverged. Checkpoints "
                "saved before are untouched. Lower learning_rate, or choose a bounded loss such as npo"
            )


def overlap_with_reference(reference: Reference, batch: Batch) -> Tensor:
    """Overlap of the experts that the model and its reference select: two passes, see `selection_overlap`.

    Args:
        reference: The model, with an adapter, and its reference.
        batch: Any batch; padding does not count.

    Returns:
        Scalar in [0, 1].

    Raises:
        RuntimeError: The model is trained in full.
    """
    with evaluation_mode(reference.model):
        now = selected_experts(reference.model, batch)
    with reference.base_model():
        before = selected_experts(reference.model, batch)
    return selection_overlap(reference.model, now, before, mask=batch["attention_mask"])
