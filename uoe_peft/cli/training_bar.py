"""A progress bar of training that shows how much is forgotten and kept."""

from __future__ import annotations

from typing import Any, cast

from tqdm import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = {"forget_accuracy": "forget", "retain_accuracy": "retain"}


class TrainingBar(ProgressCallback):
    """The trainer's own bar, with the token accuracies of the latest log beside it instead of whole logs above it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the accuracies that were logged."""
        shown = {label: f"{float(logs[name]):.2f}" for name, label in _SHOWN.items() if logs and name in logs}
        bar = cast(tqdm | None, self.training_bar)  # None on all processes but the first
        if bar is not None:
            bar.set_postfix(shown)
