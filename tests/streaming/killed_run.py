"""A process that dies while it works on a streamed model, as if the machine had: nothing of it can clean up."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.training.conftest import TARGET, make_args, make_sets, make_tokenizer
from uoe_peft import UOEConfig, attribute_experts
from uoe_peft.attribution.sampling import sample_batches
from uoe_peft.moments import measure_moments
from uoe_peft.streaming import StreamedModel
from uoe_peft.streaming.reader import PartReader
from uoe_peft.training import UnlearningTrainer, solve_unlearning


def attribute(model: Any) -> Any:
    """The call that is killed, and made again."""
    return attribute_experts(
        model, make_sets()[0], processing_class=make_tokenizer(), batch_size=3, show_progress=False
    )


def die() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def run(checkpoint: str, state_dir: str, dies_in: str) -> None:
    """Attribute until the process dies: while a file is half-written, or before the note that a layer is done."""
    save, replace = torch.save, os.replace

    def half_saved(value: Any, path: Path) -> None:
        if f"{path.parent.name}/{path.name}" != dies_in:
            return save(value, path)
        buffer = io.BytesIO()
        save(value, buffer)
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        return die()

    notes = iter(range(100))

    def not_replaced(source: Path, target: Path) -> None:
        if Path(target).name == "progress.json" and dies_in == f"note-{next(notes)}":
            die()
        replace(source, target)

    torch.set_num_threads(1)
    torch.save = half_saved  # type: ignore[assignment]
    os.replace = not_replaced
    attribute(StreamedModel.from_pretrained(checkpoint, state_dir=state_dir, show_progress=False))


def affinities(model: Any, folder: Path) -> dict[str, Tensor]:
    """What attribution finds."""
    return {"affinity": attribute(model).affinity}


def moments(model: Any, folder: Path) -> dict[str, Tensor]:
    """Second moments in two layers."""
    batches = sample_batches(
        make_sets()[1], make_tokenizer(), max_tokens=1000, batch_size=3, max_length=None, seed=0, name="retain"
    )
    measured = measure_moments(model, batches, [TARGET, (2, 0)], strict=False)
    return {str(name): own.second for name, own in measured.slices.items()}


def solve(model: Any, folder: Path) -> dict[str, Tensor]:
    """A solution's deltas."""
    options: dict[str, Any] = {"processing_class": make_tokenizer(), "target_experts": [TARGET], "keep_retain": 0.5}
    return deltas(solve_unlearning(model, *make_sets(), **options, batch_size=3, show_progress=False))


def train(model: Any, folder: Path) -> dict[str, Tensor]:
    """Deltas after four steps of RMU, from the last checkpoint of an earlier process on."""
    trainer = UnlearningTrainer(
        model=model,
        args=make_args(
            output_dir=str(folder),
            max_steps=4,
            forget_loss="rmu",
            retain_loss="embed_diff",
            save_strategy="steps",
            save_steps=1,
        ),
        train_dataset=make_sets()[0],
        retain_dataset=make_sets()[1],
        processing_class=make_tokenizer(),
        peft_config=UOEConfig(target_experts=[TARGET]),
        callbacks=[DiesInStep()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    return deltas(trainer.model)


def deltas(model: Any) -> dict[str, Tensor]:
    """What an adapter learned."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "uoe_" in name}


class DiesInStep(TrainerCallback):
    """Ends this process in a step of training."""

    step: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            die()


STAGES = {"attribute": affinities, "moments": moments, "solve": solve, "train": train}


def run_stage(stage: str, checkpoint: str, folder: str, dies_in: tuple[str, int]) -> None:
    """Work on a stage until the process dies: when a part of the model is read, or in a step of training."""
    where, number = dies_in
    reads, read = iter(range(1, 1000)), PartReader.read

    def counted(self: PartReader, belongs: Any) -> dict[str, Tensor]:
        if where == "read" and next(reads) == number:
            die()
        return read(self, belongs)

    torch.set_num_threads(1)
    PartReader.read = counted  # type: ignore[method-assign]
    DiesInStep.step = number if where == "step" else None
    model = StreamedModel.from_pretrained(checkpoint, state_dir=f"{folder}/states", show_progress=False)
    STAGES[stage](model, Path(folder) / "output")
