"""TRL's `SFTTrainer` for unlearning: paired forget and retain batches, and the losses of the field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback

from uoe_peft.data import Batch, PairedDataset, UnlearningCollator
from uoe_peft.dense import is_factorized
from uoe_peft.moe.interventions import find_decoder
from uoe_peft.moe.passes import find_streamed
from uoe_peft.moe.routing import RoutingTrace, record_routing
from uoe_peft.precision import say_if_slow
from uoe_peft.training.auto import resolve_auto
from uoe_peft.training.callbacks import NewPairsEachEpoch, OffloadPrefix, StopWhenForgotten
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.evaluating import EvaluatingTrainer
from uoe_peft.training.model_card import PAPER
from uoe_peft.training.objective.build import build_objective
from uoe_peft.training.objective.objective import Objective
from uoe_peft.training.objective.step import Denominators, Step, StepBatches, count
from uoe_peft.training.optim.optimising import OptimisingTrainer
from uoe_peft.training.optim.sophia import sophia_and_options
from uoe_peft.training.processes import check_engine
from uoe_peft.training.reuse.prefix_cache import PrefixSource
from uoe_peft.training.reuse.reuse import Reuse
from uoe_peft.training.reuse.rows import Row, TrainingRows
from uoe_peft.training.saving import SavingTrainer
from uoe_peft.training.setup import (
    check_arguments,
    check_model,
    check_sets,
    load_model,
    load_tokenizer,
    pair_sets,
    say_what_is_off,
)
from uoe_peft.training.step_log import check_finite, is_logged_step, mean_over_processes, overlap_with_reference
from uoe_peft.training.strength.calibrating import CalibratingTrainer
from uoe_peft.training.strength.validation import split_retain
from uoe_peft.tuner import UOEConfig


class UnlearningTrainer(CalibratingTrainer, OptimisingTrainer, SavingTrainer, EvaluatingTrainer):
    """Trains a model to forget one set and to keep another.

    Everything is as in TRL's :class:`~trl.SFTTrainer`, except: `train_dataset` is the forget set; each of its batches
    is paired with a batch of `retain_dataset`; the loss is the one that :class:`UnlearningConfig` names; and
    `eval_dataset` is evaluated by likelihood and token accuracy. UOE adapters also get the router anchor, Eq. 3 of
    https://arxiv.org/abs/2411.18797, on the forget batch.

    Losses that compare with a reference ask the same model with its adapter off, see `reference`. A model that is
    trained in full is asked once, before the first step.

    Sums over tokens and over examples are divided by the counts of the whole batch of an optimiser step, over all
    accumulation steps and processes: 4 × 1 accumulation gives the gradient of 1 × 4.

    Args:
        model: A causal language model, a PEFT model, or the name of a model.
        args: Which losses, and how to train.
        train_dataset: The forget set, text in the types that `tokenize_dataset` names. For "dpo" and "idk" it
            may have a column "alternative".
        retain_dataset: The retain set, likewise; needed unless `retain_loss` is "none".
        eval_dataset: A set, or a dict of sets such as `{"forget": ..., "retain": ...}`.
        processing_class: Tokenizer or processor; None: the model's own.
        peft_config: Wraps the model in an adapter; `UOEConfig(target_experts="auto")` attributes on the forget set.
        compute_metrics: As in TRL.
        callbacks: As in TRL.
        optimizers: As in TRL.
        **kwargs: Further arguments of `SFTTrainer`.

    Raises:
        ValueError: No forget set, or an empty one; a retain loss without a retain set; answers that are all truncated
            away; a loss that this model or this data cannot have.
        UnsupportedModelError: `target_experts` with a model that has no routed experts.
    """

    _tag_names = ["uoe-peft", "unlearning", "trl"]  # noqa: RUF012 - as in TRL
    _name = "Unlearning"
    _paper = PAPER
    # The loss is the average over micro-batches, see `Denominators`; the Trainer divides by their number.
    loss_is_scaled_for_ga: bool | None = False  # type: ignore[assignment]

    args: UnlearningConfig
    model: PreTrainedModel
    train_dataset: PairedDataset
    objective: Objective

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: UnlearningConfig | None = None,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        retain_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[[Any], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **kwargs: Any,
    ) -> None:
        args = UnlearningConfig() if args is None else args
        check_arguments(args, kwargs)
        check_sets(args, train_dataset, retain_dataset)
        retain_dataset, aside = split_retain(retain_dataset, args, eval_dataset)
        processing_class = processing_class or load_tokenizer(model, args)
        if isinstance(model, str) and is_factorized(model):
            model = load_model(model, args, kwargs.get("quantization_config"))
        paired = None
        if isinstance(peft_config, UOEConfig) and peft_config.target_experts == "auto":
            model = load_model(model, args, kwargs.get("quantization_config"))
            formatting_func = kwargs.get("formatting_func")
            peft_config, paired = resolve_auto(
                peft_config,
                model,
                train_dataset,
                retain_dataset,
                processing_class,
                args,
                formatting_func=formatting_func,
            )
        if args.optim == "sophia":
            kwargs.setdefault("optimizer_cls_and_kwargs", sophia_and_options(args))
        self._trace: RoutingTrace | None = None
        self._step = StepBatches()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        check_engine(self.model, self.accelerator)
        self.data_collator = UnlearningCollator(self._tokenizer.pad_token_id, cast(Any, args.pad_to_multiple_of))
        self.train_dataset = paired or pair_sets(
            train_dataset, retain_dataset, self._processing_class, args, formatting_func=self._formatting_func
        )
        check_model(self.model, args)
        self.objective = build_objective(self.model, args, device=args.device)
        self.reuse = self._make_reuse()
        self._prepare_calibration(aside)
        self._add_callbacks(retain_dataset)
        say_what_is_off(args, self.objective.targets)
        with self.accelerator.autocast():
            say_if_slow(self.model)

    # ---- Setting up ----

    def _make_reuse(self) -> Reuse:
        def collate(role: str, rows: Sequence[Row]) -> Batch:
            return cast(Batch, self._prepare_inputs(self.data_collator([{role: row} for row in rows])[role]))

        return Reuse(
            self.model,
            TrainingRows(self.train_dataset, self.args, collate),
            self.accelerator,
            source=self._prefix_source,
            evaluated=lambda: [*self.evaluated_rows(), *self._rows_that_choose()],
            sharded=lambda: self.is_sharded,
        )

    def _prefix_source(self) -> PrefixSource:
        return PrefixSource(
            model=self.model,
            batch_size=self.args.train_batch_size,
            pad_token_id=self._tokenizer.pad_token_id,
            place=self._prepare_inputs,
            context=self.accelerator.autocast,
        )

    def _add_callbacks(self, retain_dataset: Any) -> None:
        self.add_callback(NewPairsEachEpoch(self.train_dataset))
        self._add_projection(retain_dataset)  # first, before layers leave the device: moments need them
        if self.args.offload_prefix:
            self.add_callback(OffloadPrefix(self.reuse.offload))
        if self.args.stop_when_forget_accuracy is not None:
            self.add_callback(StopWhenForgotten(self.args.stop_when_forget_accuracy))
        self._add_estimates()

    def _set_signature_columns_if_needed(self) -> None:
        # Rows of pairs hold roles, rows of evaluation sets hold columns.
        self._signature_columns = cast(Any, ["forget", "retain", "alternative", "input_ids", "labels"])

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as in transformers; what does not change in training is computed first."""
        with self.reuse.training(self.objective) as self.objective, self._routing() as self._trace:
            try:
                return super().train(*args, **kwargs)
            finally:
                self._trace = None
                self._release_optimising()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimiser step; their counts, over all processes, are kept for the losses."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._step = StepBatches({role: self._count(batches, role) for role in batches[0]}, batches[0])
        return batches, None

    def _count(self, batches: list[dict[str, Batch]], role: str) -> Denominators:
        """Of each of the parts that one optimiser step is split into: micro-batches times processes."""
        own = torch.stack([count(batch[role]) for batch in batches]).sum(dim=0).to(self.args.device)
        counts = self.accelerator.reduce(own, reduction="sum")
        self._total_train_tokens += int(counts[2])
        return Denominators(*(counts / (len(batches) * self.accelerator.num_processes)))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The unlearning loss of a pair of batches; of a plain batch, as evaluation has, its likelihood."""
        if "forget" not in inputs:
            with self._reusing({"evaluation": inputs}):
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        routing = self._routing() if self._trace is None else nullcontext(self._trace)
        with routing as trace, self._reusing(inputs):
            # What is only logged must not read the layers above the loss from disk.
            counts, logged = self._step.counts, self._is_logged_step() and find_streamed(self.model) is None
            step = self.objective.step(model, inputs, trace, counts, with_likelihood=logged)
        self._record(step, inputs)
        return (step.loss(self.args), step.outputs) if return_outputs else step.loss(self.args)

    @contextmanager
    def _reusing(self, batches: Mapping[str, Batch]) -> Iterator[None]:
        with self.reuse.naming_rows(batches, self._tokenizer.decode), self.reuse.from_prefix():
            yield

    def _routing(self) -> AbstractContextManager[RoutingTrace | None]:
        targets = self.objective.targets
        layers, device = sorted(targets), self.args.device
        return record_routing(self.model, layer_indices=layers, device=device) if layers else nullcontext()

    # ---- Logging ----

    def _record(self, step: Step, batches: dict[str, Batch]) -> None:
        values = {f"loss_{name}": term.detach() for name, term in step.terms.items()} | step.metrics
        if self.args.log_routing and self.objective.targets and self._is_logged_step():
            for role in ("forget", "retain"):
                if role in batches:
                    with self.reuse.from_prefix(find_decoder(self.model)):
                        overlap = overlap_with_reference(self.objective.reference, batches[role])
                    values[f"{role}_selection_overlap"] = overlap
        means = mean_over_processes(values, self.accelerator)
        terms = {name: means[f"loss_{name}"] for name in step.terms}
        check_finite(terms, batches, self.args, step=self.state.global_step + 1)
        for name, value in means.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _is_logged_step(self) -> bool:
        return is_logged_step(self.args, self.state, num_epochs=self.reuse.rows.num_epochs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimated operations of a step, over the batches of all roles."""
        batches = inputs.values() if "forget" in inputs else (inputs,)
        return sum(super(UnlearningTrainer, self).floating_point_ops(batch) for batch in batches)
