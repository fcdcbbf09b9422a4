"""What optimisers and masks of the literature ask of a trainer beside its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from trl.trainer.sft_trainer import SFTTrainer

from uoe_peft.data import Batch, PairedDataset
from uoe_peft.losses.answer_tokens import mean
from uoe_peft.moe.routing import RoutingTrace
from uoe_peft.moments import Moments
from uoe_peft.training.callbacks import EstimateCurvature
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.objective.objective import Objective
from uoe_peft.training.objective.step import StepBatches
from uoe_peft.training.optim.curvature import Estimates, estimate_curvature
from uoe_peft.training.optim.masks import KeepMasked, Masks, weight_attribution_mask
from uoe_peft.training.optim.projection import RetainProjection, moments_of_edits, sampled_rows
from uoe_peft.training.optim.relearner import Relearner
from uoe_peft.training.processes import masks_from_first_process
from uoe_peft.training.reuse.reuse import Reuse
from uoe_peft.training.setup import prepare_set


class OptimisingTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with Sophia's curvature, WAGLE's masks, the retain projection and a simulated relearning."""

    args: UnlearningConfig
    objective: Objective
    reuse: Reuse
    train_dataset: PairedDataset
    _step: StepBatches
    _trace: RoutingTrace | None
    _keep_masked: KeepMasked | None = None
    _projection: RetainProjection | None = None
    _relearner: Relearner | None = None

    def _add_projection(self, retain_dataset: Any) -> None:
        if self.args.retain_projection is None:
            return
        if retain_dataset is None:
            raise ValueError("retain_projection needs a retain set; pass retain_dataset, or retain_projection=None")
        self._unread_retain_dataset = retain_dataset
        self._projection = RetainProjection(cast(nn.Module, self.model), self._measure, rho=self.args.retain_projection)
        self.add_callback(self._projection)

    def _release_optimising(self) -> None:
        self._relearner = None
        if self._projection is not None:
            self._projection.release()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The trainer's own step; and where it is asked for, one through weights that somebody trains back."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.args.relearner_steps:
            batches = cast(dict[str, Batch], self._prepare_inputs(inputs))
            self._forget_relearned(model, {role: batch for role, batch in batches.items() if role != "retain"})
        return loss

    def _forget_relearned(self, model: nn.Module, batches: dict[str, Batch]) -> None:
        args, relearner = self.args, self._relearner
        if relearner is None:
            own = cast(nn.Module, self.model)
            relearner = Relearner(own, learning_rate=args.relearner_rate, num_steps=args.relearner_steps)
            self._relearner = relearner
        with relearner.applied(), self.accelerator.autocast():
            step = self.objective.step(model, batches, self._trace, self._step.counts)
            nll = -mean(step.outputs.log_probs, self._step.counts["forget"].tokens)
            # The average over the parts of the step's batch, as the Trainer makes it of their losses.
            parts = self.current_gradient_accumulation_steps
            relearner.learn(nll / parts, gradients_of=step.loss(args) / parts)
        self._metrics["train"]["relearned_nll"].append(nll.item())
        if self.accelerator.sync_gradients:  # the last part of the step's batch
            relearner.step()

    def _add_estimates(self) -> None:
        if self.args.optim == "sophia" and self.args.sophia_estimator != "squared_gradient":
            self.add_callback(EstimateCurvature(self._estimate_curvature))
        if self.args.weight_mask_ratio is not None:
            self._keep_masked = KeepMasked(cast(nn.Module, self.model), self._attribute_weights)
            self.add_callback(self._keep_masked)

    def _estimate_curvature(self) -> Estimates:
        batches = cast(dict[str, Batch], self._prepare_inputs(dict(self._step.first)))
        with self.accelerator.autocast(), self.reuse.from_prefix():
            estimates = estimate_curvature(self.objective, batches, self._trace)
        return {p: self.accelerator.reduce(estimate, reduction="mean") for p, estimate in estimates.items()}

    def _attribute_weights(self) -> Masks:
        model, rows = cast(nn.Module, self.model), self.reuse.rows
        ratio, mu = cast(float, self.args.weight_mask_ratio), self.args.weight_mask_mu
        with self.accelerator.autocast(), self.reuse.from_prefix():
            retain = rows.first_epoch("retain") if "retain" in self.train_dataset.sets else None
            masks = weight_attribution_mask(model, rows.first_epoch("forget"), retain, ratio=ratio, mu=mu)
        return masks_from_first_process(masks)

    def _measure(self, role: str) -> Moments:
        rows = self.train_dataset.sets.get(role)
        if rows is None:  # a retain set that no loss reads
            retain, written = self._unread_retain_dataset, self._formatting_func
            rows = prepare_set(retain, cast(Any, self.processing_class), self.args, name=role, formatting_func=written)
        batches = self.reuse.rows.batches(role, sampled_rows(rows, seed=self.args.seed))
        with self.accelerator.autocast():
            return moments_of_edits(cast(nn.Module, self.model), batches, name=role)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._keep_masked is not None:
            self._keep_masked.load(Path(resume_from_checkpoint))
        if self._projection is not None:
            self._projection.load(Path(resume_from_checkpoint))
