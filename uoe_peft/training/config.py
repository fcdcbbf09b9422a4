"""Configuration of unlearning: TRL's `SFTConfig` and the choice of losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from trl.trainer.sft_config import SFTConfig

from uoe_peft.attribution.scores import Score
from uoe_peft.training.choices import CHOICES, DEFAULT_BETA, ForgetLoss, ReferenceKind, RetainLoss
from uoe_peft.training.optim.options import OptimiserOptions
from uoe_peft.training.strength.options import StrengthOptions


@dataclass
class UnlearningConfig(OptimiserOptions, StrengthOptions, SFTConfig):
    """Arguments of :class:`UnlearningTrainer`: TRL's `SFTConfig`, `OptimiserOptions`, `StrengthOptions`, and these.

    Four defaults differ from TRL's. `learning_rate` is the paper's 1e-4. `gradient_checkpointing` is off: with one
    edited expert nothing is stored for the layers below it anyway. `bf16` is on only where there is an accelerator.
    And `router_aux_loss_coef` is 0: load balancing works against the anchor.

    Args:
        forgets: What is forgotten, in your own words, for the model card: it is never taken from the data. None: the
            card says that it is not stated.
        forget_loss: "grad_ascent" (with `retain_loss="nll"` this is GradDiff), "npo", "simnpo", "rmu", "dpo", "idk",
            "undial", "wga", "satimp", "random_label" or "adversarial_label". The two with other answers to the forget
            questions are those of TOFU: "idk" is the cross-entropy of the other answer alone, "dpo" prefers it to the
            forget answer, with the base model as reference and the factor 2 / beta of "npo".
        retain_loss: "none", "nll", "kl", "embed_diff" (RMU's) or "relative_embed_diff", the same as a share of each
            hidden state's squared norm: its weight means the same in any layer. All but "none" need a retain set.
        forget_weight: Weight of the forget loss, >= 0.
        retain_weight: Weight of the retain loss, >= 0.
        alternative_weight: Weight of the cross-entropy on alternative answers beside any forget loss, >= 0: the forget
            loss takes the old answer away, this says what to answer instead. Alternatives are the forget set's column
            "alternative", or drawn from "I don't know" phrases. "idk" is this term alone.
        anchor_weight: Weight of the router anchor, Eq. 3 of https://arxiv.org/abs/2411.18797, >= 0. It applies to
            models with a UOE adapter only.
        anchor_scores: Router scores in the anchor: "softmax" over all experts, or "topk", those of the selected
            experts and 0 elsewhere.
        anchor_reduction: "token": mean over tokens of the squared distance; "mean_gate": the distance of the mean,
            which is a function of a whole batch: over accumulation steps and processes it is averaged part by part,
            and training then depends on how a batch is split.
        beta: The forget loss's own: npo 0.1, simnpo 4.5, dpo 0.1, undial 10, wga 1, and adaptive rmu 5 (a multiple of
            the hidden state's norm). None: these values.
        npo_reduction: Whether an answer's likelihood in "npo" is the "sum" or the "mean" over its tokens.
        simnpo_delta: Margin of "simnpo", in nats per token.
        satimp_beta1: Exponent of the probability in "satimp".
        satimp_beta2: Exponent of one minus the probability.
        reference: What "npo", "dpo", "undial", adaptive "rmu", "kl" and both "embed_diff" compare the model with.
            "current": the model as it was given, without the adapter that is trained: adapters that are active but
            frozen, of earlier requests, stay on. "base": without any adapter. With one adapter both are the base model.
        rmu_layer: Decoder layer whose output "rmu" and both "embed_diff" read; -1 is the model's last. None: the last
            layer that the UOE adapter edits. Their passes end there; accuracy and likelihood, which need the whole
            model, are measured at the steps that are logged (every tenth, where the log has one entry an epoch).
        rmu_coefficient: Steering coefficient c of "rmu": 2 to 6.5 in shallow layers, thousands in deep ones. None:
            adaptive, `beta` times the norm of each token's hidden state under the base model.
        rmu_seed: Seed of the direction that "rmu" steers to.
        retain_token_weights: "trace": retain tokens that reach the edited expert count more in the retain loss "nll".
            The rates behind the weights are those of each part of a batch, with the same consequence as "mean_gate".
        trace_cap: Largest ratio of forget to retain rate in "trace", >= 1.
        attribution_score: What `UOEConfig(target_experts="auto")` ranks experts by; "contrast" needs a retain set.
        attribution_gate: Which gate values attribution reads: "softmax" or "applied".
        num_target_experts: How many experts "auto" selects; the paper finds one to be best.
        stop_when_forget_accuracy: Stop once the token accuracy on forget batches, averaged over the steps between two
            logs (with "rmu": at the step that is logged), is at or below this. None: never.
        log_routing: Log, at each logging step, how far selected experts overlap with the reference's on forget and
            retain tokens. Costs two forward passes of each batch at these steps, from the lowest edited layer on where
            there is a prefix cache: layers below it select as ever. Shares of the tokens that reach the target experts
            are always logged: they come with the passes that run anyway.
        prefix_cache: Compute what enters the lowest edited layer once for each example, keep it on disk, and start
            every step there. "auto": where examples come up more than once and the model, tried on two of its rows,
            gives the same results; otherwise training says why and runs the whole model. True: raise instead. False:
            never. Results equal those of the whole model to the rounding of its dtype.
        prefix_cache_dir: Where the cache is kept for later runs on the same model and rows, and beside it what the base
            model says of them: likelihoods ("npo", "dpo") and hidden states (adaptive "rmu", both "embed_diff"). It is
            found by what it depends on, all weights of the reference included. None: a temporary folder that is removed
            after training. With several processes the first of each machine fills it, and the others
            wait for it, at most `ddp_timeout`.
        offload_prefix: Take the layers below the lowest edited one off the device during training, so that a model
            trains that fits, but leaves no room for a step: to the CPU, or, where the model is on the CPU, to files
            that the system reads when it needs to. They come back at the end. Needs a prefix cache, and one process.
            Sequences that are not in the cache then cannot run on an accelerator: of evaluation sets, only what
            `eval_strategy` or `eval_on_start` evaluates is there.
        metric_for_best_model: As in transformers. With an `eval_dataset` of `{"forget": ..., "retain": ...}` there is
            also "balance", the harmonic mean of `1 - exp(-forget loss)` and `exp(-retain loss)`: with
            `load_best_model_at_end=True` training ends with the checkpoint that best forgets *and* retains.

    Raises:
        ValueError: An unknown choice, a number out of range, or an option of `SFTConfig` that unlearning cannot
            honour (`packing`, `padding_free`, sampling by length, `loss_type`, `label_smoothing_factor`).
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations; off."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bfloat16; None: where there is an accelerator."}
    )
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Load balancing; 0, since it works against the anchor."}
    )
    forgets: str | None = field(
        default=None, metadata={"help": "What is forgotten, in your own words, for the model card."}
    )
    forget_loss: ForgetLoss = field(default="npo", metadata={"help": "Loss on the forget set."})
    retain_loss: RetainLoss = field(default="nll", metadata={"help": "Loss on the retain set."})
    forget_weight: float = field(default=1.0, metadata={"help": "Weight of the forget loss."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain loss."})
    alternative_weight: float = field(default=0.0, metadata={"help": "Weight of the alternative answers' loss."})
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
    reference: ReferenceKind = field(
        default="current", metadata={"help": "What losses compare with: active frozen adapters on, or none."}
    )
    rmu_layer: int | None = field(
        default=None, metadata={"help": "Layer that rmu and both embed_diff read; -1: the last."}
    )
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
    log_routing: bool = field(default=False, metadata={"help": "Log routing overlap with the reference."})
    prefix_cache: Literal["auto", True, False] = field(
        default="auto", metadata={"help": "Start every step at the lowest edited layer."}
    )
    prefix_cache_dir: str | None = field(
        default=None, metadata={"help": "Where the prefix cache is kept; None: removed after training."}
    )
    offload_prefix: bool = field(
        default=False, metadata={"help": "Take layers below the lowest edited one off the device during training."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.accelerator.is_available() and not self.use_cpu
        self._settle_checkpointing()
        optim = self.optim
        if optim == "sophia":
            self.optim = "adamw_torch"  # transformers accepts the names of its own enum only
        super().__post_init__()
        self.optim = optim if optim == "sophia" else self.optim
        self._check_choices()
        self._check_numbers()
        self._check_offloading()
        self._check_optimiser()
        self._check_inherited()
        self._check_strength(offload_prefix=self.offload_prefix)

    @property
    def forget_beta(self) -> float:
        """`beta`, or the forget loss's own default; for losses without one, 0."""
        return DEFAULT_BETA.get(self.forget_loss, 0.0) if self.beta is None else self.beta

    @property
    def needs_alternatives(self) -> bool:
        """Whether training reads other answers to the forget set's questions."""
        return self.forget_loss in ("dpo", "idk") or self.alternative_weight > 0

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
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")

    def _check_numbers(self) -> None:
        weights = ("forget_weight", "retain_weight", "alternative_weight", "anchor_weight")
        for name in (*weights, "satimp_beta1", "satimp_beta2"):
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

    def _check_offloading(self) -> None:
        if not self.offload_prefix:
            return
        if self.prefix_cache is False:
            raise ValueError("offload_prefix=True needs a prefix cache, got prefix_cache=False; leave it at 'auto'")
        if self.fsdp or self.deepspeed or self.world_size > 1 or self.n_gpu > 1:
            raise ValueError(
                "offload_prefix=True works in one process on one device, without fsdp and deepspeed, got world_size="
                f"{self.world_size}, n_gpu={self.n_gpu}; launch one process, or pass offload_prefix=False"
            )

    def _check_inherited(self) -> None:
        if self.packing or self.padding_free or self.eval_packing:
            raise ValueError(
                "packing and padding_free are not supported: each forget example is paired with a retain example, "
                "and sentences of different examples must not share a row"
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy must be 'random' or 'sequential', got {self.train_sampling_strategy!r}: a "
                "row of training is a pair of examples, and there is no one length to sort pairs by"
            )
        if self.loss_type != "nll":
            raise ValueError(f"loss_type must stay 'nll', got {self.loss_type!r}; choose forget_loss and retain_loss")
        if self.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor must stay 0, got {self.label_smoothing_factor}")
        if self.assistant_only_loss and self.completion_only_loss is False:
            raise ValueError(
                "assistant_only_loss=True and completion_only_loss=False contradict each other here: the second counts "
                "every token of a conversation; leave both as they are to count what the assistant says"
            )
        if self.retain_token_weights == "trace" and self.retain_loss != "nll":
            raise ValueError(f"retain_token_weights='trace' needs retain_loss='nll', got {self.retain_loss!r}")
