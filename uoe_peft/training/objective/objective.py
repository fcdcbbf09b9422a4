"""The chosen forget and retain losses, applied to a pair of batches.

`L = forget_weight * L_forget + retain_weight * L_retain + anchor_weight * L_anchor`, Eq. 4 of
https://arxiv.org/abs/2411.18797, and where it is asked for `alternative_weight * L_alternative`. This module maps names
to losses; the losses are in `uoe_peft.losses`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from uoe_peft import losses
from uoe_peft.data import Batch
from uoe_peft.moe.routing import RoutingTrace
from uoe_peft.training.choices import HIDDEN_RETAIN_LOSSES
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.objective.anchor import Targets, anchor_term, selects_target, target_rates
from uoe_peft.training.objective.forward import AnswerOutputs, forward_answers, vocab_size
from uoe_peft.training.objective.reference import Need, Reference
from uoe_peft.training.objective.rewards import reward_metrics
from uoe_peft.training.objective.step import Denominators, Step


@dataclass(frozen=True)
class Objective:
    """Forget and retain loss of a pair of batches.

    Attributes:
        args: Which losses, and their parameters.
        reference: The base model's view.
        targets: Target experts of UOE adapters by layer; empty for other models.
        direction: Where "rmu" steers to, shape `(H,)`; None for other losses.
        anchored: Whether the router anchor applies: not where every token uses all experts.
    """

    args: UnlearningConfig
    reference: Reference
    targets: Targets
    direction: Tensor | None = None
    anchored: bool = True

    def step(
        self,
        model: nn.Module,
        batches: Mapping[str, Batch],
        trace: RoutingTrace | None,
        denominators: Mapping[str, Denominators],
        *,
        with_likelihood: bool = True,
    ) -> Step:
        """Run the model on a pair of batches and compute each loss term.

        Args:
            model: What to call: the trained model, or what a launcher wrapped it in.
            batches: "forget", where there is a retain loss "retain", for some losses "alternative".
            trace: Routing of the target layers in the model's latest pass; None for models without targets.
            denominators: By role; where one is missing, the batch's own counts.
            with_likelihood: Measure accuracy and likelihood where the losses do not need them, too: passes whose loss
                reads hidden states alone then go on to the LM head.
        """
        forget, no_counts = batches["forget"], Denominators()
        outputs = self._run(model, forget, self.forget_layer, with_likelihood=with_likelihood)
        terms: dict[str, Tensor] = {}
        metrics = _likelihood("forget", outputs)
        forget_rates: Tensor | None = None
        # The trace is of the latest pass: it is read before the model is called again.
        if trace is not None:
            mask = forget["attention_mask"]
            forget_rates = target_rates(trace, self.targets, mask)
            metrics["target_activation_rate"] = forget_rates.mean()
            if self.args.anchor_weight > 0 and self.anchored:
                context = denominators.get("forget", no_counts).context
                terms["anchor"] = anchor_term(trace, self.targets, mask, args=self.args, denominator=context)
        terms["forget"] = self.forget(model, batches, outputs, denominators, metrics)
        if self.args.alternative_weight > 0:
            terms["alternative"] = self._alternative(model, batches, denominators)
        if "retain" in batches:
            retain = batches["retain"]
            kept = self._run(model, retain, self.retain_layer, with_likelihood=with_likelihood)
            metrics |= _likelihood("retain", kept)
            if trace is not None:
                rates = target_rates(trace, self.targets, retain["attention_mask"])
                metrics["retain_activation_rate"] = rates.mean()
            weights = self._token_weights(trace, retain, forget_rates)
            counts = denominators.get("retain", no_counts)
            terms["retain"] = self.retain(model, retain, kept, counts, token_weights=weights)
        return Step(terms, metrics, outputs)

    def _run(
        self, model: nn.Module, batch: Batch, hidden_layer: int | None, *, with_likelihood: bool = True
    ) -> AnswerOutputs:
        """The model on a batch; no further than a loss that reads hidden states alone needs."""
        ends = hidden_layer is not None and not with_likelihood
        return forward_answers(
            model,
            batch,
            hidden_layer=hidden_layer,
            last_layer=self.reference.last_layer if ends else None,
            logits_at_once=self.reference.logits_at_once,
        )

    def _token_weights(self, trace: RoutingTrace | None, retain: Batch, forget_rates: Tensor | None) -> Tensor | None:
        if self.args.retain_token_weights == "none" or trace is None or forget_rates is None:
            return None
        return losses.trace_weights(
            selects_target(trace, self.targets, losses.answer_positions(retain["labels"])),
            forget_rates,
            target_rates(trace, self.targets, retain["attention_mask"]),
            cap=self.args.trace_cap,
        )

    def reference_needs(self, *, examples_come_again: bool, on_disk: bool) -> dict[str, Need]:
        """What to ask the base model before the first step, by role.

        With an adapter the base model can be asked at any time. Keeping hidden states in memory would then only cost,
        and keeping likelihoods pays where examples come up again.

        Args:
            examples_come_again: Whether training goes through the forget set more than once.
            on_disk: Whether there is a folder to keep it in, for this run or later ones.
        """
        # Asked in the middle of a relearner's pass, the base would be the one that he has moved.
        args, asked_once = self.args, on_disk or not self.reference.has_adapter or self.args.relearner_steps > 0
        needs: dict[str, Need] = {}
        if args.forget_loss in ("npo", "dpo") and (examples_come_again or asked_once):
            needs["forget"] = "nll"
            if args.forget_loss == "dpo":
                needs["alternative"] = "nll"
        if args.forget_loss == "rmu" and args.rmu_coefficient is None and asked_once:
            needs["forget"] = "hidden"
        if args.retain_loss in HIDDEN_RETAIN_LOSSES and args.needs_retain and asked_once:
            needs["retain"] = "hidden"
        return needs

    @property
    def forget_layer(self) -> int | None:
        """Decoder layer whose output the forget loss reads."""
        return self.reference.hidden_layer if self.args.forget_loss == "rmu" else None

    @property
    def retain_layer(self) -> int | None:
        """Decoder layer whose output the retain loss reads."""
        return self.reference.hidden_layer if self.args.retain_loss in HIDDEN_RETAIN_LOSSES else None

    def forget(
        self,
        model: nn.Module,
        batches: Mapping[str, Batch],
        outputs: AnswerOutputs,
        denominators: Mapping[str, Denominators],
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """The forget loss.

        Args:
            model: The model, for losses that need a further pass.
            batches: "forget", and "alternative" for "dpo" and "idk".
            outputs: The model's outputs on the forget batch.
            denominators: By role; where one is missing, the batch's own counts.
            metrics: Takes what the loss finds on its way, see `reward_metrics`.

        Returns:
            Scalar, before weighting.
        """
        args, batch = self.args, batches["forget"]
        counts = denominators.get("forget", Denominators())
        tokens, examples = counts.tokens, counts.examples
        match args.forget_loss:
            case "grad_ascent":
                return losses.grad_ascent_loss(outputs.log_probs, denominator=tokens)
            case "wga":
                return losses.wga_loss(outputs.log_probs, beta=args.forget_beta, denominator=tokens)
            case "satimp":
                return losses.satimp_loss(
                    outputs.log_probs, beta1=args.satimp_beta1, beta2=args.satimp_beta2, denominator=tokens
                )
            case "npo":
                nll, ref_nll = outputs.nll(), self.reference.nll(model, batch)
                if args.npo_reduction == "mean":
                    nll, ref_nll = nll / outputs.lengths, ref_nll / outputs.lengths
                metrics |= reward_metrics(args.forget_beta * (ref_nll - nll))
                return losses.npo_loss(nll, ref_nll, beta=args.forget_beta, denominator=examples)
            case "simnpo":
                nll, beta, delta = outputs.nll(), args.forget_beta, args.simnpo_delta
                return losses.simnpo_loss(nll, outputs.lengths, beta=beta, delta=delta, denominator=examples)
            case "dpo":
                nll, ref_nll = outputs.nll(), self.reference.nll(model, batch)
                other = self._run(model, batches["alternative"], None).nll()
                ref_other = self.reference.nll(model, batches["alternative"])
                metrics |= reward_metrics(args.forget_beta * (ref_nll - nll), args.forget_beta * (ref_other - other))
                return losses.dpo_loss(nll, ref_nll, other, ref_other, beta=args.forget_beta, denominator=examples)
            case "idk":
                return self._alternative(model, batches, denominators)
            case "undial":
                teacher = self.reference.answers(model, batch)
                return losses.mean(outputs.compared(teacher, self._undial(outputs.targets)), tokens)
            case "random_label":
                labels = losses.random_labels(
                    outputs.lengths.tolist(), vocab_size=vocab_size(model), seeds=batch["seed"].tolist()
                ).to(outputs.targets)
                return losses.mean(outputs.nll_of(lambda _, part: labels[part]), tokens)
            case "adversarial_label":
                wrong = outputs.nll_of(lambda logits, part: losses.adversarial_labels(logits, outputs.targets[part]))
                return losses.mean(wrong, tokens)
            case "rmu":
                return self._rmu(model, batch, outputs, tokens)

    def _alternative(
        self, model: nn.Module, batches: Mapping[str, Batch], denominators: Mapping[str, Denominators]
    ) -> Tensor:
        said = self._run(model, batches["alternative"], None)
        counts = denominators.get("alternative", Denominators())
        return losses.nll_loss(said.log_probs, denominator=counts.tokens)

    def _undial(self, targets: Tensor) -> Callable[[Tensor, Tensor, slice], Tensor]:
        def distance(logits: Tensor, ref_logits: Tensor, part: slice) -> Tensor:
            return losses.undial_loss(logits, ref_logits, targets[part], beta=self.args.forget_beta, reduction="none")

        return distance

    def _rmu(self, model: nn.Module, batch: Batch, outputs: AnswerOutputs, tokens: Tensor | None) -> Tensor:
        if outputs.hidden is None or self.direction is None:
            raise RuntimeError("rmu needs hidden states and a direction; pass hidden_layer to the forward pass")
        coefficient: float | Tensor | None = self.args.rmu_coefficient
        if coefficient is None:
            ref_hidden = self.reference.hidden(model, batch)
            coefficient = losses.adaptive_coefficient(ref_hidden, beta=self.args.forget_beta)
        return losses.rmu_loss(outputs.hidden, self.direction, coefficient=coefficient, denominator=tokens)

    def retain(
        self,
        model: nn.Module,
        batch: Batch,
        outputs: AnswerOutputs,
        denominators: Denominators,
        *,
        token_weights: Tensor | None = None,
    ) -> Tensor:
        """The retain loss.

        Args:
            model: The model, for losses that need a further pass.
            batch: The retain batch.
            outputs: The model's outputs on it.
            denominators: Of the retain batch.
            token_weights: Weights of the answer tokens in "nll". Shape `(N,)`.

        Returns:
            Scalar, before weighting.

        Raises:
            ValueError: The retain loss is "none".
        """
        tokens = denominators.tokens
        match self.args.retain_loss:
            case "nll":
                return losses.nll_loss(outputs.log_probs, weights=token_weights, denominator=tokens)
            case "kl":
                base = self.reference.answers(model, batch)
                return losses.mean(
                    outputs.compared(base, lambda logits, ref, _: losses.kl_loss(logits, ref, reduction="none")), tokens
                )
            case "embed_diff" | "relative_embed_diff" as name:
                if outputs.hidden is None:
                    raise RuntimeError(f"{name} needs hidden states; pass hidden_layer to the forward pass")
                loss = losses.embed_diff_loss if name == "embed_diff" else losses.relative_embed_diff_loss
                return loss(outputs.hidden, self.reference.hidden(model, batch), denominator=tokens)
            case "none":
                raise ValueError("retain_loss is 'none': there is no retain loss to compute")


def _likelihood(role: str, outputs: AnswerOutputs) -> dict[str, Tensor]:
    """What is logged of a batch; nothing where the forward pass ended below the LM head."""
    if outputs.predictions is None:
        return {}
    return {f"{role}_accuracy": outputs.accuracy, f"{role}_nll": -outputs.log_probs.detach().mean()}
