"""What the options of unlearning may be, by name; one place for all of them."""

from __future__ import annotations

from typing import Literal, get_args

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
RetainLoss = Literal["none", "nll", "kl", "embed_diff", "relative_embed_diff"]
ReferenceKind = Literal["base", "current"]
"""The model without any adapter, or without those that are trained."""
SophiaEstimator = Literal["squared_gradient", "gauss_newton_bartlett", "hutchinson"]

HIDDEN_RETAIN_LOSSES = ("embed_diff", "relative_embed_diff")
"""Those that compare hidden states with the reference's."""

CHOICES = {
    "forget_loss": get_args(ForgetLoss),
    "retain_loss": get_args(RetainLoss),
    "anchor_scores": ("softmax", "topk"),
    "anchor_reduction": ("token", "mean_gate"),
    "npo_reduction": ("sum", "mean"),
    "retain_token_weights": ("none", "trace"),
    "attribution_score": get_args(Score),
    "attribution_gate": ("softmax", "applied"),
    "reference": get_args(ReferenceKind),
    "prefix_cache": ("auto", True, False),
    "sophia_estimator": get_args(SophiaEstimator),
}

# The papers' own defaults; one place for all of them.
DEFAULT_BETA: dict[str, float] = {"npo": 0.1, "simnpo": 4.5, "dpo": 0.1, "undial": 10.0, "wga": 1.0, "rmu": 5.0}
