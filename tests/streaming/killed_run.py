"""A process that dies while it attributes a streamed model, as if the machine had: nothing of it can clean up."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import torch

from tests.training.conftest import make_sets, make_tokenizer
from uoe_peft import attribute_experts
from uoe_peft.streaming import StreamedModel


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
