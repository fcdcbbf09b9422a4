"""Ctrl-C and SIGTERM end training after the step that runs, with a checkpoint from which it can go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAfterStep(TrainerCallback):
    """Saves and ends training at the end of the step in which :attr:`asked` was set.

    Attributes:
        asked: Whether a signal has come.
        running: Whether steps run: before the first there is nothing to save.
    """

    def __init__(self) -> None:
        self.asked = False
        self.running = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From now on there is something to save."""
        self.running = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where a signal has come."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave at once where a signal has come: what follows training, such as choosing a strength, takes its time."""
        if self.asked:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals: the first one stops after the step, the second one, or one before any step, at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only
            return
        before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.running:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step, with a checkpoint; once more stops at once", flush=True)
