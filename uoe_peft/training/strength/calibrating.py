"""A trainer that ends with a choice: how strong should be what it trained?"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from torch import nn
from trl.trainer.sft_trainer import SFTTrainer

from uoe_peft.data import Batch, PairedDataset
from uoe_peft.training.callbacks import AtTheEnd
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.reuse.reuse import Reuse
from uoe_peft.training.setup import prepare_set
from uoe_peft.training.strength.calibration import Calibration
from uoe_peft.training.strength.choice import StrengthChoice
from uoe_peft.training.strength.scaling import CannotScale, restore_strengths
from uoe_peft.training.strength.validation import NoValidationRows, validation_rows

logger = logging.getLogger(__name__)


class CalibratingTrainer(SFTTrainer):
    """TRL's `SFTTrainer` that chooses the strength of what was trained, see `StrengthOptions`.

    Attributes:
        strength_choice: What was chosen at the end of the last training; None where none was.
    """

    args: UnlearningConfig
    reuse: Reuse
    is_sharded: bool
    strength_choice: StrengthChoice | None = None
    _calibration: Calibration | None = None

    def _prepare_calibration(self, aside: Dataset | None) -> None:
        """Settle what strengths are tried on; where that cannot be, the log says why, or an error if it was asked for.

        Args:
            aside: Retain rows that training does not read, as they were given.
        """
        if self.args.calibration_goal is None:
            return
        try:
            self._calibration = self._make_calibration(aside)
        except (CannotScale, NoValidationRows) as error:
            if self.args.calibrate != "auto":
                raise
            logger.info("the strength is not chosen after training: %s", error)
            return
        # Before the callbacks that close what is logged to, and those that use the trained model.
        self.callback_handler.callbacks.insert(0, AtTheEnd(self._choose_strength))

    def _make_calibration(self, aside: Dataset | None) -> Calibration:
        if self.is_sharded:
            raise CannotScale("its weights are split over processes (FSDP, DeepSpeed, distributed_config)")
        tokenizer, formatting_func = cast(Any, self.processing_class), self._formatting_func
        kept = aside
        if aside is not None:
            kept = prepare_set(aside, tokenizer, self.args, name="retain", formatting_func=formatting_func)
        forget = cast(PairedDataset, self.train_dataset).forget
        rows = validation_rows(forget, kept, self.args, self.eval_dataset)
        return Calibration(
            cast(nn.Module, self.model),
            self.args,
            rows,
            collate=lambda batch: cast(Batch, self._prepare_inputs(cast(Any, self.data_collator)(batch))),
            context=self._as_in_training,
        )

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        with self.accelerator.autocast(), self.reuse.from_prefix():
            yield

    def _rows_that_choose(self) -> list[list[int]]:
        """Token ids of the rows on which strengths are tried."""
        return [] if self._calibration is None else self._calibration.sequences

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; at the end the strength is chosen."""
        self.strength_choice = None
        if self._calibration is not None:
            self._calibration.begin()
        return super().train(*args, **kwargs)

    def _choose_strength(self) -> None:
        self.strength_choice = cast(Calibration, self._calibration).choose()
        for record in [] if self.strength_choice is None else self.strength_choice.logs():
            self.log(record)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Only tensors are read there, and a strength that was chosen since is not that of the checkpoint.
        restore_strengths(cast(nn.Module, self.model), Path(resume_from_checkpoint))
