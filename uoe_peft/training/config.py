"""Configuration of unlearning: TRL's `SFTConfig` and the choice of losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from trl.trainer.sft_config import SFTConfig

from uoe_peft.attribution.scores import Score

ForgetLoss = Literal[
    "grad_ascent",
    "npo",
    "simnpo",
    "rmu",
    "dpo",
    "idk",
    "undial",
    "wga",
    "satimp",
    "random_label",
    "adversarial_label",
]
RetainLoss = Literal["none", "nll", "kl", "embed_diff"]

_CHOICES = {
    "forget_loss": get_args(ForgetLoss),
    "retain_loss": get_args(RetainLoss),
    "anchor_scores": ("softmax", "topk"),
    "anchor_reduction": ("token", "mean_gate"),
    "npo_reduction": ("sum", "mean"),
    "retain_token_weights": ("none", "trace"),
    "attribution_score": get_args(Score),
    "attribution_gate": ("softmax", "applied"),
}

# The papers' own defaults; one place for all of them.
_DEFAULT_BETA: dict[str, float] = {"npo": 0.1, "simnpo": 4.5, "dpo": 0.1, "undial": 10.0, "wga": 1.0, "rmu": 5.0}


@dataclass
class UnlearningConfig(SFTConfig):
    """Arguments of :class:`UnlearningTrainer`: those of TRL's `SFTConfig`, and the following.

    Three defaults differ from TRL's. `learning_rate` is the paper's 1e-4. `gradient_checkpointing` is off: with one
    edited expert nothing is stored for the layers below it anyway. `bf16` is on only where there is an accelerator.
    And `router_aux_loss_coef` is 0: load balancing works against the anchor.

    Args:
        forget_loss: "grad_ascent" (with `retain_loss="nll"` this is GradDiff), "npo", "simnpo", "rmu", "dpo", "idk",
            "undial", "wga", "satimp", "random_label" or "adversarial_label".
        retain_loss: "none", "nll", "kl" or "embed_diff" (RMU's). All but "none" need a retain set.
        forget_weight: Weight of the forget loss, >= 0.
        retain_weight: Weight of the retain loss, >= 0.
        anchor_weight: Weight of the router anchor, Eq. 3 of https://arxiv.org/abs/2411.18797, >= 0. It applies to
            models with a UOE adapter only.
        anchor_scores: Router scores in the anchor: "softmax" over all experts, or "topk", those of the selected
            experts and 0 elsewhere.
        anchor_reduction: "token": mean over tokens of the squared distance; "mean_gate": the distance of the mean.
        beta: The forget loss's own: npo 0.1, simnpo 4.5, dpo 0.1, undial 10, wga 1, and adaptive rmu 5 (a multiple of
            the hidden state's norm). None: these values.
        npo_reduction: Whether an answer's likelihood in "npo" is the "sum" or the "mean" over its tokens.
        simnpo_delta: Margin of "simnpo", in nats per token.
        satimp_beta1: Exponent of the probability in "satimp".
        satimp_beta2: Exponent of one minus the probability.
        rmu_layer: Decoder layer whose output "rmu" and "embed_diff" read. None: the last layer that the UOE adapter
            edits.
        rmu_coefficient: Steering coefficient c of "rmu": 2 to 6.5 in shallow layers, thousands in deep ones. None:
            adaptive, `beta` times the norm of each token's hidden state under the base model.
        rmu_seed: Seed of the direction that "rmu" steers to.
        retain_token_weights: "trace": retain tokens that reach the edited expert count more in the retain loss "nll".
        trace_cap: Largest ratio of forget to retain rate in "trace", >= 1.
        attribution_score: What `UOEConfig(target_experts="auto")` ranks experts by; "contrast" needs a retain set.
        attribution_gate: Which gate values attribution reads: "softmax" or "applied".
        num_target_experts: How many experts "auto" selects; the paper finds one to be best.
        stop_when_forget_accuracy: Stop once the token accuracy on forget batches, averaged over the steps between two
            logs, is at or below this. None: never.
        log_routing: Log, at each logging step, how far selected experts overlap with the base model's on forget and
            retain tokens. Costs one forward pass of each batch at these steps.

    Raises:
        ValueError: An unknown choice, a number out of range, or an option of `SFTConfig` that unlearning cannot
            honour (`packing`, `padding_free`, `loss_type`, `label_smoothing_factor`).
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations; off."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bfloat16; None: where there is an accelerator."}
    )
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Load balancing; 0, since it works against the anchor."}
    )
    forget_loss: ForgetLoss = field(default="npo", metadata={"help": "Loss on the forget set."})
    retain_loss: RetainLoss = field(default="nll", metadata={"help": "Loss on the retain set."})
    forget_weight: float = field(default=1.0, metadata={"help": "Weight of the forget loss."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain loss."})
    anchor_weight: float = field(default=1.0, metadata={"help": "Weight of the router anchor."})
    anchor_scores: Literal["softmax", "topk"] = field(
        default="softmax", metadata={"help": "Router scores in the anchor."}
    )
    anchor_reduction: Literal["token", "mean_gate"] = field(
        default="token", metadata={"help": "How the anchor is reduced over tokens."}
    )
    beta: float | None = field(default=None, metadata={"help": "The forget loss's beta; None: its own default."})
    npo_reduction: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "Over the tokens of an answer, in npo."}
    )
    simnpo_delta: float = field(default=0.0, metadata={"help": "Margin of simnpo, nats per token."})
    satimp_beta1: float = field(default=5.0, metadata={"help": "Exponent of p in satimp."})
    satimp_beta2: float = field(default=1.0, metadata={"help": "Exponent of 1 - p in satimp."})
    rmu_layer: int | None = field(default=None, metadata={"help": "Layer that rmu and embed_diff read."})
    rmu_coefficient: float | None = field(default=None, metadata={"help": "c of rmu; None: adaptive."})
    rmu_seed: int = field(default=0, metadata={"help": "Seed of rmu's direction."})
    retain_token_weights: Literal["none", "trace"] = field(
        default="none", metadata={"help": "Weights of retain tokens in nll."}
    )
    trace_cap: float = field(default=10.0, metadata={"help": "Largest ratio in trace weights."})
    attribution_score: Score = field(default="gate", metadata={"help": 'What target_experts="auto" ranks by.'})
    attribution_gate: Literal["softmax", "applied"] = field(
        default="softmax", metadata={"help": "Gate values that attribution reads."}
    )
    num_target_experts: int = field(default=1, metadata={"help": 'How many experts "auto" selects.'})
    stop_when_forget_accuracy: float | None = field(
        default=None, metadata={"help": "Stop once forget token accuracy is at or below this."}
    )
    log_routing: bool = field(default=True, metadata={"help": "Log routing overlap with the base model."})

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.accelerator.is_available() and not self.use_cpu
        self._settle_checkpointing()
        super().__post_init__()
        self._check_choices()
        self._check_numbers()
        self._check_inherited()

    @property
    def forget_beta(self) -> float:
        """`beta`, or the forget loss's own default; for losses without one, 0."""
        return _DEFAULT_BETA.get(self.forget_loss, 0.0) if self.beta is None else self.beta

    @property
    def needs_retain(self) -> bool:
        """Whether training reads a retain set."""
        return self.retain_loss != "none" and self.retain_weight > 0

    def _settle_checkpointing(self) -> None:
        # transformers renamed these and warns about the old names, which TRL and everybody's scripts still use.
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        not_negative = ("forget_weight", "retain_weight", "anchor_weight", "satimp_beta1", "satimp_beta2")
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        zero_allowed = self.forget_loss in ("undial", "wga")
        if self.beta is not None and not (self.beta > 0 or (zero_allowed and self.beta == 0)):
            raise ValueError(f"beta of {self.forget_loss!r} must be > 0, got {self.beta}")
        if self.trace_cap < 1:
            raise ValueError(f"trace_cap must be >= 1, got {self.trace_cap}")
        if self.num_target_experts < 1:
            raise ValueError(f"num_target_experts must be >= 1, got {self.num_target_experts}")
        stop = self.stop_when_forget_accuracy
        if stop is not None and not 0 <= stop <= 1:
            raise ValueError(f"stop_when_forget_accuracy must be in [0, 1], got {stop}")

    def _check_inherited(self) -> None:
        if self.packing or self.padding_free or self.eval_packing:
            raise ValueError(
                "packing and padding_free are not supported: each forget example is paired with a retain example, "
                "and sentences of different examples must not share a row"
            )
        if self.loss_type != "nll":
            raise ValueError(f"loss_type must stay 'nll', got {self.loss_type!r}; choose forget_loss and retain_loss")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor must stay 0, got {self.label_smoothing_factor}")
        if self.retain_token_weights == "trace" and self.retain_loss != "nll":
            raise ValueError(f"retain_token_weights='trace' needs retain_loss='nll', got {self.retain_loss!r}")
