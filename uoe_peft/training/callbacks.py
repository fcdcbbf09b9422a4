"""What happens beside the steps: new pairs for each epoch, curvature, stopping once enough is forgotten, a last act."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uoe_peft.data import PairedDataset
from uoe_peft.training.optim.curvature import Estimates
from uoe_peft.training.optim.sophia import Sophia

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewPairsEachEpoch(TrainerCallback):
    """Tells the paired data set which epoch has begun.

    Accelerate's data loaders tell a sampler *or* a data set, and with several processes it is the sampler.
    """

    dataset: PairedDataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand out the pairs of the epoch that begins, also in the middle of one after resuming."""
        self.dataset.set_epoch(int(state.epoch or 0))


@dataclass(frozen=True)
class OffloadPrefix(TrainerCallback):
    """Moves weights off the device once the Trainer has put the whole model there.

    Attributes:
        offload: Moves them.
    """

    offload: Callable[[], None]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move them; after running out of memory with `auto_find_batch_size`, once more."""
        self.offload()


@dataclass(frozen=True)
class StopWhenForgotten(TrainerCallback):
    """Stops training once the token accuracy on forget batches is low enough.

    Attributes:
        accuracy: Stop at or below this, averaged over the steps between two logs.
    """

    accuracy: float

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the accuracy that was just logged."""
        reached = (logs or {}).get("forget_accuracy")
        if reached is not None and reached <= self.accuracy:
            logger.info("stopping at step %d: forget token accuracy %.3f", state.global_step, reached)
            control.should_training_stop = True


@dataclass(frozen=True)
class EstimateCurvature(TrainerCallback):
    """Gives Sophia an estimate of the curvature whenever it wants one.

    Attributes:
        estimate: Computes it on the step's data.
    """

    estimate: Callable[[], Estimates]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Estimate before the step, if it is due."""
        sophia = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not isinstance(sophia, Sophia):
            raise TypeError(f"sophia_estimator needs optim='sophia' and no optimizer of your own, got {sophia!r}")
        if sophia.curvature_is_due:
            sophia.add_curvature(self.estimate())


@dataclass(frozen=True)
class AtTheEnd(TrainerCallback):
    """Does something once training has ended, with the best model loaded if that was asked for.

    Attributes:
        act: What is done.
    """

    act: Callable[[], None]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do it."""
        self.act()
