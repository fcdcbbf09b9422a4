"""TRL's `SFTTrainer` for unlearning: paired forget and retain batches, and the losses of the field."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PredictionOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from uoe_peft.data import Batch, PairedDataset
from uoe_peft.losses import answer_positions, control_direction
from uoe_peft.losses.answers import IGNORED_LABEL
from uoe_peft.moe.interventions import find_decoder
from uoe_peft.moe.routing import RoutingTrace, record_routing
from uoe_peft.moe.segments import find_layers
from uoe_peft.moments import Moments
from uoe_peft.training.balance import forget_retain_balance
from uoe_peft.training.callbacks import EstimateCurvature, NewPairsEachEpoch, OffloadPrefix, StopWhenForgotten
from uoe_peft.training.checkpoint import load_full_checkpoint
from uoe_peft.training.collator import UnlearningCollator
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.model_card import PAPER, add_loading_section
from uoe_peft.training.objective.forward import decoder_layer
from uoe_peft.training.objective.objective import Denominators, Objective, Step
from uoe_peft.training.objective.reference import Reference
from uoe_peft.training.optim.curvature import Estimates, estimate_curvature
from uoe_peft.training.optim.masks import KeepMasked, Masks, weight_attribution_mask
from uoe_peft.training.optim.projection import RetainProjection, moments_of_edits, sampled_rows
from uoe_peft.training.optim.sophia import sophia_and_options
from uoe_peft.training.preparation import (
    check_model,
    check_sets,
    load_model,
    load_tokenizer,
    pair_sets,
    prepare_set,
    say_what_is_off,
)
from uoe_peft.training.reuse.choice import (
    cache_or_none,
    indices_in_training,
    reference_folder,
    rows_in_training,
    state_folder,
)
from uoe_peft.training.reuse.offload import layers_away, naming_rows
from uoe_peft.training.reuse.prefix_cache import PrefixCache, PrefixSource, edited_layers, prefix_cache, trained_beside
from uoe_peft.training.reuse.reference_store import keep_reference
from uoe_peft.training.reuse.shortcuts import take_shortcuts
from uoe_peft.training.reuse.store import PrefixCacheUnavailable, StateFolder
from uoe_peft.training.reuse.store_key import base_weights, weights_key
from uoe_peft.training.routing_shift import selection_overlap
from uoe_peft.training.targets import active_configs, find_targets, resolve_auto
from uoe_peft.tuner import UOEConfig

logger = logging.getLogger(__name__)

# Where the log has one entry an epoch.
_STEPS_BETWEEN_LOOKS = 10


class UnlearningTrainer(SFTTrainer):
    """Trains a model to forget one set and to keep another.

    Everything is as in TRL's :class:`~trl.SFTTrainer`, except: `train_dataset` is the forget set; each of its batches
    is paired with a batch of `retain_dataset`; the loss is the one that :class:`UnlearningConfig` names; and
    `eval_dataset` is evaluated by likelihood and token accuracy. UOE adapters also get the router anchor, Eq. 3 of
    https://arxiv.org/abs/2411.18797, on the forget batch.

    Losses that compare with the base model ask the same model with its adapter disabled. A model that is trained in
    full is asked once, before the first step.

    Sums over tokens and over examples are divided by the counts of the whole batch of an optimiser step, over all
    accumulation steps and processes: 4 × 1 accumulation gives the gradient of 1 × 4.

    Args:
        model: A causal language model, a PEFT model, or the name of a model.
        args: Which losses, and how to train.
        train_dataset: The forget set, of any of TRL's types. For "dpo" and "idk" it may have a column "alternative".
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
        check_sets(args, train_dataset, retain_dataset)
        processing_class = processing_class or load_tokenizer(model, args)
        if isinstance(peft_config, UOEConfig) and peft_config.target_experts == "auto":
            model = load_model(model, args, kwargs.get("quantization_config"))
            peft_config = resolve_auto(
                peft_config, model, train_dataset, processing_class, retain_dataset=retain_dataset, args=args
            )
        if args.optim == "sophia":
            kwargs.setdefault("optimizer_cls_and_kwargs", sophia_and_options(args))
        self._unpaired = (train_dataset, retain_dataset)
        self._trace: RoutingTrace | None = None
        self._prefix: PrefixCache | None = None
        self._until_trained = ExitStack()
        self._denominators: dict[str, Denominators] = {}
        self._overlap_logged_at = -1
        self._keep_masked: KeepMasked | None = None
        self._projection: RetainProjection | None = None
        self._reference_is_final = False
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
        self.data_collator = UnlearningCollator(self._tokenizer.pad_token_id, cast(Any, args.pad_to_multiple_of))
        self.train_dataset = pair_sets(
            *self._unpaired, self._processing_class, args, formatting_func=self._formatting_func
        )
        check_model(self.model, args)
        self.objective = self._make_objective()
        self._add_callbacks()
        say_what_is_off(args, self.objective.targets)

    # ---- Setting up ----

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        # TRL calls this for every set, once it has settled the tokenizer. The training set is paired after that.
        if dataset_name == "train":
            return dataset
        config = cast(UnlearningConfig, args)
        return prepare_set(dataset, processing_class, config, name=dataset_name, formatting_func=formatting_func)

    @property
    def _processing_class(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        return cast(Any, self.processing_class)

    def _make_objective(self) -> Objective:
        targets = find_targets(self.model)
        if self.args.forget_loss != "rmu" and self.args.retain_loss != "embed_diff":
            return Objective(self.args, Reference(self.model), targets)
        layer_idx = self.args.rmu_layer if self.args.rmu_layer is not None else max(targets, default=None)
        if layer_idx is None:
            raise ValueError(
                "rmu and embed_diff read the output of one decoder layer: set rmu_layer (an adapter of another method "
                "than UOE, or none, does not name a layer)"
            )
        decoder_layer(self.model, layer_idx)  # an index out of range is said now, not at the first step
        layers = find_layers(self.model)
        edited = edited_layers(layers)
        if not trained_beside(self.model, layers) and layer_idx < min(edited):
            raise ValueError(
                f"rmu_layer={layer_idx} is below every layer that is trained, {edited}: its output does not depend on "
                "what is trained; choose one of these layers, or one above"
            )
        hidden_size = self.model.config.get_text_config().hidden_size
        direction = control_direction(hidden_size, seed=self.args.rmu_seed).to(self.args.device)
        return Objective(self.args, Reference(self.model, layer_idx), targets, direction)

    def _add_callbacks(self) -> None:
        self.add_callback(NewPairsEachEpoch(self.train_dataset))
        if self.args.retain_projection is not None:  # first, before layers leave the device: moments need them
            if self._unpaired[1] is None:
                raise ValueError("retain_projection needs a retain set; pass retain_dataset, or retain_projection=None")
            self._projection = RetainProjection(self.model, self._measure, rho=self.args.retain_projection)
            self.add_callback(self._projection)
        if self.args.offload_prefix:
            self.add_callback(OffloadPrefix(self._offload_prefix))
        if self.args.stop_when_forget_accuracy is not None:
            self.add_callback(StopWhenForgotten(self.args.stop_when_forget_accuracy))
        if self.args.optim == "sophia" and self.args.sophia_estimator != "squared_gradient":
            self.add_callback(EstimateCurvature(self._estimate_curvature))
        if self.args.weight_mask_ratio is not None:
            self._keep_masked = KeepMasked(self.model, self._attribute_weights)
            self.add_callback(self._keep_masked)

    def _set_signature_columns_if_needed(self) -> None:
        # Rows of pairs hold roles, rows of evaluation sets hold columns.
        self._signature_columns = cast(Any, ["forget", "retain", "alternative", "input_ids", "labels"])

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as in transformers; what does not change in training is computed first."""
        make, num_epochs = self._make_prefix_cache, self._num_epochs()
        with (
            state_folder(self.args, self.accelerator) as folder,
            cache_or_none(
                self.args, lambda: make(folder), num_epochs=num_epochs, sharded=self._is_sharded
            ) as self._prefix,
        ):
            self._take_shortcuts()
            from_cache = self._prefix is not None
            kept = reference_folder(folder, from_cache=from_cache, num_epochs=num_epochs, sharded=self._is_sharded)
            try:
                self._precompute_reference(kept)
            except PrefixCacheUnavailable as error:
                if self.args.prefix_cache is True:
                    raise
                logger.warning("what the base model says is not kept on disk: %s", error)
                self._precompute_reference(None)
            with self._routing() as self._trace, self._until_trained:
                try:
                    return super().train(*args, **kwargs)
                finally:
                    self._trace = self._prefix = None
                    if self._projection is not None:
                        self._projection.release()

    def _make_prefix_cache(self, folder: StateFolder | None) -> AbstractContextManager[PrefixCache]:
        source = PrefixSource(
            model=self.model,
            batch_size=self.args.train_batch_size,
            pad_token_id=self._tokenizer.pad_token_id,
            place=self._prepare_inputs,
            context=self.accelerator.autocast,
        )
        rows = [*rows_in_training(self.train_dataset, num_epochs=self._num_epochs()), *self._evaluated_rows()]
        return prefix_cache(source, rows, folder=folder)

    def _evaluated_rows(self) -> list[list[int]]:
        if self.eval_dataset is None or (self.args.eval_strategy == "no" and not self.args.eval_on_start):
            return []
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [ids for rows in sets for ids in cast(Any, rows)["input_ids"]]

    def _from_prefix(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        return nullcontext() if self._prefix is None else self._prefix.serve(self.model if model is None else model)

    def _offload_prefix(self) -> None:
        layer_idx = cast(PrefixCache, self._prefix).layer_idx
        self._until_trained.close()  # where training begins anew with a smaller batch
        self._until_trained.enter_context(layers_away(self.model, layer_idx, directory=self.args.prefix_cache_dir))

    def _naming_rows(self, batches: Mapping[str, Batch]) -> AbstractContextManager[None]:
        return nullcontext() if self._prefix is None else naming_rows(self._prefix, batches, self._tokenizer.decode)

    def _take_shortcuts(self) -> None:
        longest = max(
            sum(label != IGNORED_LABEL for label in labels)
            for rows in self.train_dataset.sets.values()
            for labels in rows["labels"]
        )
        with self.accelerator.autocast(), self._from_prefix():
            self.objective = take_shortcuts(
                self.objective,
                next(self._first_epoch("forget")),
                num_answer_tokens=longest * self.args.train_batch_size,
                whole_model=self._is_sharded or self.args.torch_compile,
            )

    def _precompute_reference(self, folder: StateFolder | None) -> None:
        reference, num_epochs = self.objective.reference, self._num_epochs()
        needs = self.objective.reference_needs(examples_come_again=num_epochs > 1, on_disk=folder is not None)
        indices = indices_in_training(self.train_dataset, num_epochs=num_epochs)
        if self._reference_is_final:
            if not all(reference.knows(need, role, indices[role]) for role, need in needs.items()):
                raise ValueError(
                    "train() was called before, and now reads rows of which the base model was not asked then: a model "
                    "that is trained in full has none left. Make a new trainer from the base model, with all the "
                    "epochs or max_steps that you want"
                )
            return
        autocast = self.accelerator.autocast
        weights = cache(lambda: weights_key(self.model, base_weights(self.model), context=autocast))
        for role, need in needs.items():
            dataset = self.train_dataset.sets[role]
            rows = [{**dataset[index], "index": index} for index in indices[role]]
            batches = partial(self._batches, role)
            with autocast(), self._from_prefix():
                if folder is None:
                    reference.precompute(role, batches(rows), need=need)
                else:
                    keep_reference(reference, role, rows, need=need, folder=folder, weights=weights, batches=batches)
        # Trained in full, the model is its own reference before its first step, and never again.
        self._reference_is_final = not reference.has_adapter

    def _batches(self, role: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[Batch]:
        left = iter(rows)
        while chunk := [{role: row} for row in islice(left, self.args.train_batch_size)]:
            yield cast(Batch, self._prepare_inputs(self.data_collator(chunk)[role]))

    def _num_epochs(self) -> float:
        if self.args.max_steps > 0:
            batches = len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size)
            batches = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
            return self.args.max_steps / max(1, math.ceil(batches / self.args.gradient_accumulation_steps))
        return float(self.args.num_train_epochs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimiser step; their counts, over all processes, are kept for the losses."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._denominators = {role: self._count(batches, role) for role in (batches[0] if batches else ())}
        self._first_micro_batch = batches[0] if batches else {}
        return batches, None

    def _count(self, batches: list[dict[str, Batch]], role: str) -> Denominators:
        per_batch = [
            torch.stack(
                [
                    answer_positions(batch[role]["labels"]).sum(),
                    torch.ones_like(batch[role]["index"]).sum(),
                    batch[role]["attention_mask"].sum(),
                ]
            )
            for batch in batches
        ]
        counts = self.accelerator.reduce(torch.stack(per_batch).sum(dim=0).to(self.args.device), reduction="sum")
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
            with self._naming_rows({"evaluation": inputs}), self._from_prefix():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        routing = self._routing() if self._trace is None else nullcontext(self._trace)
        with routing as trace, self._naming_rows(inputs), self._from_prefix():
            step = self.objective.step(model, inputs, trace, self._denominators, with_likelihood=self._is_logged_step())
        self._record(step, inputs)
        return (step.loss(self.args), step.outputs) if return_outputs else step.loss(self.args)

    def _routing(self) -> AbstractContextManager[RoutingTrace | None]:
        targets = self.objective.targets
        return record_routing(self.model, layer_indices=sorted(targets)) if targets else nullcontext()

    def _estimate_curvature(self) -> Estimates:
        batches = cast(dict[str, Batch], self._prepare_inputs(self._first_micro_batch))
        with self.accelerator.autocast(), self._from_prefix():
            estimates = estimate_curvature(self.objective, batches, self._trace)
        return {p: self.accelerator.reduce(estimate, reduction="mean") for p, estimate in estimates.items()}

    def _attribute_weights(self) -> Masks:
        ratio = cast(float, self.args.weight_mask_ratio)
        with self.accelerator.autocast(), self._from_prefix():
            retain = self._first_epoch("retain") if "retain" in self.train_dataset.sets else None
            mu = self.args.weight_mask_mu
            return weight_attribution_mask(self.model, self._first_epoch("forget"), retain, ratio=ratio, mu=mu)

    def _measure(self, role: str) -> Moments:
        rows = self.train_dataset.sets.get(role)
        if rows is None:  # a retain set that no loss reads
            retain, formatting_func = cast(Dataset, self._unpaired[1]), self._formatting_func
            rows = prepare_set(retain, self._processing_class, self.args, name=role, formatting_func=formatting_func)
        with self.accelerator.autocast():
            batches = self._batches(role, sampled_rows(rows, seed=self.args.seed))
            return moments_of_edits(self.model, batches, name=role)

    def _first_epoch(self, role: str) -> Iterator[Batch]:
        self.train_dataset.set_epoch(0)
        return self._batches(role, (self.train_dataset[index][role] for index in range(len(self.train_dataset))))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_saved_whole:
            load_full_checkpoint(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._keep_masked is not None:
            self._keep_masked.load(Path(resume_from_checkpoint))
        if self._projection is not None:
            self._projection.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._is_saved_whole:
            load_full_checkpoint(self.model, cast(str, self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def _is_saved_whole(self) -> bool:
        """Whether checkpoints are what `save_pretrained` writes: no adapter, no shards of a launcher."""
        return not self._is_sharded and not isinstance(cast(nn.Module, self.model), PeftModel)

    @property
    def _is_sharded(self) -> bool:
        """Asked of the trainer: a launcher may say so without the arguments."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or cast(str, self.args.output_dir))
        add_loading_section(folder / "README.md", active_configs(self.model))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in TRL; of a UOE adapter also how to load it."""
        super().create_model_card(*args, **kwargs)
        add_loading_section(Path(cast(str, self.args.output_dir)) / "README.md", active_configs(self.model))

    # ---- Evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; of a forget and a retain set also their balance, see `metric_for_best_model`."""
        metrics = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        both = [metrics.get(f"{prefix}_{role}_loss") for role in ("forget", "retain")]
        if None not in both:
            metrics[f"{prefix}_balance"] = forget_retain_balance(*cast(list[float], both))
            self.log({f"{prefix}_balance": metrics[f"{prefix}_balance"]})
        return metrics

    def predict(self, test_dataset: Dataset | IterableDataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As in transformers; the set is tokenised on the way, as in `evaluate`."""
        formatting_func = self._formatting_func
        prepared = prepare_set(
            test_dataset, self._processing_class, self.args, name="test", formatting_func=formatting_func
        )
        return super().predict(prepared, *args, **kwargs)

    # ---- Logging ----

    def _record(self, step: Step, batches: dict[str, Batch]) -> None:
        values = {f"loss_{name}": term.detach() for name, term in step.terms.items()} | step.metrics
        if self._overlap_is_due():
            for role in ("forget", "retain"):
                if role in batches:
                    with self._from_prefix(find_decoder(self.model)):
                        overlap = selection_overlap(self.objective.reference, batches[role])
                    values[f"{role}_selection_overlap"] = overlap
        # One exchange between processes and one wait for the device, for all values together.
        gathered = self.accelerator.gather(torch.stack([value.float() for value in values.values()])[None])
        means = dict(zip(values, gathered.mean(dim=0).tolist(), strict=True))
        for name in step.terms:
            self._check_finite(name, means[f"loss_{name}"], batches)
        for name, value in means.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _overlap_is_due(self) -> bool:
        step = self.state.global_step
        if not self.args.log_routing or not self.objective.targets or step == self._overlap_logged_at:
            return False
        self._overlap_logged_at = step  # the first micro-batch of a step is enough
        return self._is_logged_step()

    def _is_logged_step(self) -> bool:
        step, interval = self.state.global_step + 1, max(int(self.state.logging_steps or 1), 1)
        match self.args.logging_strategy:
            case "steps":
                return step % interval == 0 or (step == 1 and self.args.logging_first_step)
            case "epoch":
                steps_an_epoch = max(1, round(self.state.max_steps / self._num_epochs()))
                return step % _STEPS_BETWEEN_LOOKS == 0 or step % steps_an_epoch == 0
            case _:
                return False

    def _check_finite(self, name: str, value: float, batches: dict[str, Batch]) -> None:
        if math.isfinite(value):
            return
        term = {
            "forget": f"forget loss ({self.args.forget_loss})",
            "retain": f"retain loss ({self.args.retain_loss})",
            "anchor": "router anchor",
        }[name]
        rows = batches["retain" if name == "retain" else "forget"]["index"].tolist()
        raise FloatingPointError(
            f"step {self.state.global_step + 1}: the {term} is {value} on the rows {rows}; the model has diverged. "
            "Checkpoints saved before are untouched. Lower learning_rate, or choose a bounded loss such as npo"
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimated operations of a step, over the batches of all roles."""
        batches = inputs.values() if "forget" in inputs else (inputs,)
        return sum(super(UnlearningTrainer, self).floating_point_ops(batch) for batch in batches)
