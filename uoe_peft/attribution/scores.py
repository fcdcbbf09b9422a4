"""The scores: how much an expert has to do with a forget set, from the routing decisions of one batch at a time.

Letters: B sequences, S positions, T = B * S tokens, E experts, K experts per token, L layers.

`ablation` and `gradient` need more than routing decisions and have files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from uoe_peft.moe import MoEBlock
from uoe_peft.moe.routing import LayerRouting

Score = Literal["gate", "token_ratio", "contrast", "ablation", "gradient", "random"]
Gate = Literal["softmax", "applied"]
Statistic = Literal["softmax", "applied", "token_ratio"]

STATISTICS: tuple[Statistic, ...] = ("softmax", "applied", "token_ratio")


def softmax_gate(routing: LayerRouting) -> Tensor:
    """Gate scores of the selected experts, not renormalised: g of https://arxiv.org/abs/2411.18797. Shape `(T, K)`."""
    return routing.scores.gather(1, routing.top_k_index)


def applied_gate(routing: LayerRouting) -> Tensor:
    """Weights that the layer applies to the outputs of the selected experts. Shape `(T, K)`, float32."""
    return routing.top_k_weights.float()


def selection(routing: LayerRouting) -> Tensor:
    """`1 / K` for each selected expert: token selection ratio of https://arxiv.org/abs/2407.01906. Shape `(T, K)`."""
    return torch.full_like(routing.top_k_weights, 1 / routing.top_k_index.shape[1], dtype=torch.float32)


def sequence_means(routing: LayerRouting, mask: Tensor, *, num_experts: int) -> Tensor:
    """Each expert's mean over the tokens of each sequence, for all statistics at once.

    The inner mean of Eq. 2 of https://arxiv.org/abs/2411.18797, `1/L_j Σ_t g_j[t, i]`: an expert that a token does not
    select adds 0, a token that does not count adds nothing.

    Args:
        routing: Routing of the batch in one layer.
        mask: Tokens that count, at least one in each row. Shape `(B, S)`, bool.
        num_experts: E.

    Returns:
        In the order of `STATISTICS`. Shape `(3, B, E)`, float32.
    """
    batch_size, length = mask.shape
    num_classes = max(num_experts, routing.scores.shape[1])
    # A weight of exactly 0 is a cancelled selection: the expert computes nothing for this token.
    used = mask.reshape(-1, 1) & (routing.top_k_weights != 0)  # (T, K)
    values = torch.stack([softmax_gate(routing), applied_gate(routing), selection(routing)])  # (3, T, K)
    # Not a product: padding may hold NaN.
    values = torch.where(used, values, 0)
    row = torch.arange(batch_size, device=mask.device).repeat_interleave(length)  # (T,)
    slot = row[:, None] * num_classes + routing.top_k_index  # (T, K)
    totals = values.new_zeros(len(STATISTICS), batch_size * num_classes)
    totals.index_add_(1, slot.flatten(), values.flatten(1))
    means = totals.view(len(STATISTICS), batch_size, num_classes) / mask.sum(dim=1)[:, None]
    return means[..., :num_experts]


def contrast(forget: Tensor, retain: Tensor) -> Tensor:
    """Affinity to the forget set minus affinity to the retain set: what a generalist has in common cancels.

    Args:
        forget: Affinities. Shape `(..., L, E)`.
        retain: Affinities. Shape `(..., L, E)`.

    Returns:
        Shape `(..., L, E)`; negative where an expert serves the retain set more.
    """
    return forget - retain


def random_affinity(num_layers: int, num_experts: int, *, seed: int) -> Tensor:
    """Uniform in [0, 1), the control that every comparison needs. Shape `(L, E)`."""
    return torch.rand(num_layers, num_experts, generator=torch.Generator().manual_seed(seed))


def paired_contrast(forget: Tensor | None, retain: Tensor | None) -> Tensor | None:
    """Contrast of resamples one by one; the two sets are drawn independently, so any pairing will do."""
    if forget is None or retain is None:
        return None
    count = min(len(forget), len(retain))
    return contrast(forget[:count], retain[:count])


def check_tells_apart(blocks: Sequence[MoEBlock], *, score: Score, gate: Gate) -> None:
    """Refuse what is the same for all experts where every token uses all of them with weight 1.

    Raises:
        ValueError: Some block is of that kind, and the score or the gate cannot tell its experts apart.
    """
    if all(block.gate_name for block in blocks):
        return
    if score == "token_ratio" or (gate == "applied" and score in ("gate", "contrast", "ablation")):
        option = "score='token_ratio'" if score == "token_ratio" else "gate='applied'"
        raise ValueError(
            f"{option} cannot tell the experts apart: every token uses all of them with weight 1; use gate='softmax' "
            "with score='gate', 'contrast' or 'ablation', which goes by their shares of what the layer computes, or "
            "score='gradient'"
        )
