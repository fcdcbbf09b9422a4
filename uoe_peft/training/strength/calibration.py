"""Strengths tried on a model, and the one that was chosen set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft.data import Batch
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.processes import said_by_first_process
from uoe_peft.training.reuse.rows import Row
from uoe_peft.training.strength.choice import Point, StrengthChoice, choose_scale
from uoe_peft.training.strength.measure import known, known_after_relearning
from uoe_peft.training.strength.scaling import (
    CannotScale,
    Interpolation,
    Scaling,
    adapter_scaling,
    copies,
    trained_adapters,
    trained_parameters,
)

logger = logging.getLogger(__name__)


class Calibration:
    """Finds the strength of what was trained, and sets it.

    Only the first process tries strengths; all set the one that it found.
    """

    def __init__(
        self,
        model: nn.Module,
        args: UnlearningConfig,
        rows: Mapping[str, Dataset],
        *,
        collate: Callable[[Sequence[Row]], Batch],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Prepare for a model; nothing is measured yet.

        Args:
            model: The model that is trained, not what a launcher wraps it in.
            args: What strength is chosen for.
            rows: Tokenised rows, "forget" and, unless that is the goal's only set, "retain".
            collate: Rows -> a batch on the model's device.
            context: Makes the context of forward passes: autocast, prefix cache.

        Raises:
            CannotScale: What is trained cannot be made weaker so that it is saved.
        """
        self.model, self.args, self.rows = model, args, rows
        self._collate, self._context = collate, context
        self._base: dict[str, Tensor] | None = None
        if isinstance(model, PeftModel):
            trained_adapters(model)  # refuses those that cannot be scaled
        elif args.calibrate == "auto":
            raise CannotScale("a model that is trained in full is interpolated with its base only where asked for")

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids of all rows."""
        return [ids for rows in self.rows.values() for ids in rows["input_ids"]]

    def begin(self) -> None:
        """Keep what training in full will change, as it is before the first training; refuse adapters that are merged.

        Raises:
            ValueError: An adapter is merged.
        """
        if isinstance(self.model, PeftModel):
            adapter_scaling(self.model).set(1.0)
        elif self._base is None:
            self._base = copies(trained_parameters(self.model))
            size = sum(weight.nbytes for weight in self._base.values())
            logger.info("two copies of what is trained are needed to choose its strength: %.1f MB each", size / 1e6)

    def choose(self) -> StrengthChoice | None:
        """Try strengths, and leave the model at the one that was chosen; None, and as trained, where this failed."""
        scaling = self._scaling()
        scale = 1.0
        try:
            choice = said_by_first_process(lambda: self._choose_or_say(scaling))
            scale = 1.0 if choice is None else choice.scale
        finally:
            scaling.set(scale)
        if choice is not None:
            logger.log(logging.WARNING if choice.scale < 1 or not choice.meets_goal else logging.INFO, choice.summary())
        return choice

    def _choose_or_say(self, scaling: Scaling) -> StrengthChoice | None:
        try:
            return self._choose(scaling)
        except (ValueError, RuntimeError):  # out of memory is one
            # Training may have taken days: its caller must get to save what came of it.
            logger.exception("the strength could not be chosen: the model stays as trained")
            return None

    def _scaling(self) -> Scaling:
        if isinstance(self.model, PeftModel):
            return adapter_scaling(self.model)
        return Interpolation(self.model, cast(Any, self._base), copies(trained_parameters(self.model)))

    def _choose(self, scaling: Scaling) -> StrengthChoice:
        batches = {role: self._batches(list(rows)) for role, rows in self.rows.items()}

        def measure(scale: float) -> Point:
            scaling.set(scale)
            with self._context():
                point = {role: self._known(self.model, batches[role]) for role in batches}
            if self.args.calibrate_against == "relearning":
                point["forget_relearned"] = self._known_after_relearning()
            return point

        return choose_scale(
            measure,
            goal=cast(Any, self.args.calibration_goal),
            metric=self.args.calibrate_metric,
            forget_limit=self.args.calibrate_forget_limit,
            retain_share=self.args.calibrate_retain_share,
        )

    def _known(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        return known(model, batches, self.args.calibrate_metric)

    def _known_after_relearning(self) -> float:
        rows = list(self.rows["forget"])
        asked = self._batches(rows[1::2])
        return known_after_relearning(self.model, self._batches(rows[::2]), lambda model: self._known(model, asked))

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        size = self.args.eval_batch_size
        return [self._collate(rows[start : start + size]) for start in range(0, len(rows), size)]
