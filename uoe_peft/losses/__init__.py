"""Forget, retain and anchor losses: pure functions of tensors."""

from uoe_peft.losses.anchor import anchor_loss, mask_to_top_k
from uoe_peft.losses.answer_tokens import (
    IGNORE_INDEX,
    answer_lengths,
    answer_positions,
    answer_targets,
    mean,
    sequence_nll,
    token_log_probs,
)
from uoe_peft.losses.forget import (
    adversarial_labels,
    grad_ascent_loss,
    random_labels,
    satimp_loss,
    undial_loss,
    wga_loss,
)
from uoe_peft.losses.preference import dpo_loss, npo_loss, simnpo_loss
from uoe_peft.losses.representation import (
    adaptive_coefficient,
    control_direction,
    embed_diff_loss,
    relative_embed_diff_loss,
    rmu_loss,
)
from uoe_peft.losses.retain import kl_loss, nll_loss, trace_weights

__all__ = [
    "IGNORE_INDEX",
    "adaptive_coefficient",
    "adversarial_labels",
    "anchor_loss",
    "answer_lengths",
    "answer_positions",
    "answer_targets",
    "control_direction",
    "dpo_loss",
    "embed_diff_loss",
    "grad_ascent_loss",
    "kl_loss",
    "mask_to_top_k",
    "mean",
    "nll_loss",
    "npo_loss",
    "random_labels",
    "relative_embed_diff_loss",
    "rmu_loss",
    "satimp_loss",
    "sequence_nll",
    "simnpo_loss",
    "token_log_probs",
    "trace_weights",
    "undial_loss",
    "wga_loss",
]
