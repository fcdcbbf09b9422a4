"""All that a training run computes once and uses again, in one place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, cast

from accelerate import Accelerator
from torch import nn

from uoe_peft.data import Batch
from uoe_peft.moe.passes import check_layers, find_streamed, keep_layers
from uoe_peft.moe.segments import find_layers
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.objective.objective import Objective
from uoe_peft.training.objective.reference import Reference
from uoe_peft.training.reuse.choice import cache_or_none, reference_folder, state_folder
from uoe_peft.training.reuse.offload import layers_away, naming_rows
from uoe_peft.training.reuse.prefix_cache import PrefixCache, PrefixSource, prefix_cache
from uoe_peft.training.reuse.reference_store import keep_reference
from uoe_peft.training.reuse.rows import TrainingRows, rows_in_training
from uoe_peft.training.reuse.shortcuts import take_shortcuts
from uoe_peft.training.reuse.store import PrefixCacheUnavailable, StateFolder
from uoe_peft.training.reuse.store_key import reference_weights, weights_key

logger = logging.getLogger(__name__)


class Reuse:
    """What enters the lowest edited layer, what the reference says, and what a step may leave out.

    It is there inside :meth:`training`. Outside, models run in full.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: TrainingRows,
        accelerator: Accelerator,
        *,
        source: Callable[[], PrefixSource],
        evaluated: Callable[[], Sequence[list[int]]],
        sharded: Callable[[], bool],
    ) -> None:
        """Prepare for a model and its rows; nothing is computed before training.

        Args:
            model: The trained model, not what a launcher wraps it in.
            rows: What training reads.
            accelerator: Knows the processes and autocast.
            source: How states are computed, asked when training begins.
            evaluated: Token ids of the rows that are evaluated while training.
            sharded: Whether a launcher splits the weights (FSDP, DeepSpeed), asked when training begins.
        """
        self.model, self.rows = model, rows
        self._accelerator = accelerator
        self._source, self._evaluated, self._sharded = source, evaluated, sharded
        self._cache: PrefixCache | None = None
        self._until_trained = ExitStack()
        self._reference_is_final = False

    @property
    def args(self) -> UnlearningConfig:
        """Settings of the run."""
        return self.rows.args

    @property
    def from_cache(self) -> bool:
        """Whether passes start at the lowest edited layer now."""
        return self._cache is not None

    @contextmanager
    def training(self, objective: Objective) -> Iterator[Objective]:
        """Inside the context passes reuse what can be reused; it is computed, or found on disk, at the start.

        Args:
            objective: As the settings ask for it.

        Yields:
            The objective with the shortcuts that hold for the model.

        Raises:
            PrefixCacheUnavailable: `prefix_cache=True`, and there can be none.
            ValueError: A model that is trained in full was trained before, and now reads other rows.
        """
        args, num_epochs, sharded = self.args, self.rows.num_epochs, self._sharded()
        if find_streamed(self.model) is not None:
            check_layers(self.model, self._run_by_steps(objective.reference.hidden_layer, objective.targets))
        with (
            state_folder(args, self._accelerator) as folder,
            cache_or_none(args, lambda: self._make_cache(folder), num_epochs=num_epochs, sharded=sharded) as found,
            self._until_trained,
        ):
            self._cache = found
            try:
                objective = self._with_shortcuts(objective, whole_model=sharded or args.torch_compile)
                self._keep_what_steps_run(objective)
                kept = reference_folder(folder, from_cache=self.from_cache, num_epochs=num_epochs, sharded=sharded)
                self._ask_reference(objective, kept)
                yield objective
            finally:
                self._cache = None

    def from_prefix(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """Inside the context passes of a model, the trained one for None, start at the lowest edited layer."""
        return nullcontext() if self._cache is None else self._cache.serve(self.model if model is None else model)

    def naming_rows(self, batches: Mapping[str, Batch], decode: Callable[..., Any]) -> AbstractContextManager[None]:
        """Inside the context an error that rows miss from the cache says which; see `naming_rows` of `offload`."""
        return nullcontext() if self._cache is None else naming_rows(self._cache, batches, decode)

    def offload(self) -> None:
        """Move the layers below the lowest edited one off the device until training ends."""
        layer_idx = cast(PrefixCache, self._cache).layer_idx
        self._until_trained.close()  # where training begins anew with a smaller batch
        self._until_trained.enter_context(layers_away(self.model, layer_idx, directory=self.args.prefix_cache_dir))

    def _make_cache(self, folder: StateFolder | None) -> AbstractContextManager[PrefixCache]:
        rows = [*rows_in_training(self.rows.dataset, num_epochs=self.rows.num_epochs), *self._evaluated()]
        return prefix_cache(self._source(), rows, folder=folder)

    def _with_shortcuts(self, objective: Objective, *, whole_model: bool) -> Objective:
        with self._accelerator.autocast(), self.from_prefix():
            return take_shortcuts(
                objective,
                next(self.rows.first_epoch("forget")),
                num_answer_tokens=self.rows.longest_answer * self.args.train_batch_size,
                whole_model=whole_model,
            )

    def _keep_what_steps_run(self, objective: Objective) -> None:
        """Bring in the layers of a streamed model from the lowest edited one to the last that a step runs."""
        if self.from_cache and find_streamed(self.model) is not None:
            keep_layers(self.model, self._run_by_steps(objective.reference.last_layer, objective.targets))

    def _run_by_steps(self, last_layer: int | None, targets: Iterable[int]) -> range:
        """The layers from the lowest edited one to the last that a step runs; None: it runs all."""
        num_layers = len(find_layers(self.model)._modules)
        return range(min(targets, default=0), num_layers if last_layer is None else max([last_layer, *targets]) + 1)

    def _ask_reference(self, objective: Objective, folder: StateFolder | None) -> None:
        """Ask the reference what is needed before the first step; on disk where there is a folder with room."""
        try:
            self._precompute(objective, folder)
        except PrefixCacheUnavailable as error:
            if self.args.prefix_cache is True:
                raise
            logger.warning("what the reference says is not kept on disk: %s", error)
            self._precompute(objective, None)

    def _precompute(self, objective: Objective, folder: StateFolder | None) -> None:
        reference = objective.reference
        needs = objective.reference_needs(examples_come_again=self.rows.num_epochs > 1, on_disk=folder is not None)
        if self._reference_is_final:
            if not all(reference.knows(need, self.rows.of(role)["id"]) for role, need in needs.items()):
                raise ValueError(
                    "train() was called before, and now reads rows of which the base model was not asked then: a model "
                    "that is trained in full has none left. Make a new trainer from the base model, with all the "
                    "epochs or max_steps that you want"
                )
            return
        weights = cache(lambda: self._reference_key(reference))
        for role, need in needs.items():
            rows = [*self.rows.of(role)]
            batches = partial(self.rows.batches, role)
            with self._accelerator.autocast(), self.from_prefix():
                if folder is None:
                    reference.precompute(batches(rows), need=need)
                else:
                    keep_reference(reference, rows, need=need, folder=folder, weights=weights, batches=batches)
        # Trained in full, the model is its own reference before its first step, and never again.
        self._reference_is_final = not reference.has_adapter

    def _reference_key(self, reference: Reference) -> str:
        described, weights = reference_weights(self.model, reference.adapters_left_on)
        return weights_key(self.model, weights, described, context=self._accelerator.autocast)
