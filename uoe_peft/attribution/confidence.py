"""How sure the choice of an expert is: intervals, margin, agreement, concentration.

Letters: L layers, E experts, K experts per token, R bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
"""Coverage of all intervals."""


@dataclass(frozen=True, eq=False)
class Confidence:
    """How far the affinities would move if other sequences had been drawn, by the bootstrap over sequences.

    Attributes:
        low: Lower ends of the affinities' 95 % intervals; NaN where not measured. Shape `(L, E)`.
        high: Upper ends. Shape `(L, E)`.
        margin: Affinity of the best expert minus that of the second.
        margin_low: Lower end of the margin's 95 % interval, both experts in the same resamples.
        margin_high: Upper end.
        stability: Share of the resamples in which the best expert stays the best, 0 to 1.
        half_agreement: Share of a layer's K best experts on which two disjoint halves of the data agree, mean over
            layers (Table 8 of https://arxiv.org/abs/2411.18797); None where halves were not measured.
    """

    low: Tensor
    high: Tensor
    margin: float
    margin_low: float
    margin_high: float
    stability: float
    half_agreement: float | None

    @property
    def identified(self) -> bool:
        """Whether the best expert is ahead of the second by more than chance."""
        return self.margin_low > 0


def assess(affinity: Tensor, bootstrap: Tensor, halves: Tensor | None, *, top_k: int) -> Confidence:
    """Confidence of a table of affinities.

    Args:
        affinity: NaN where not measured; at least two are measured. Shape `(L, E)`.
        bootstrap: The same over bootstrap resamples. Shape `(R, L, E)`.
        halves: The same over two disjoint halves, or None. Shape `(2, L, E)`.
        top_k: K.

    Returns:
        The confidence.
    """
    flat, resampled = affinity.flatten(), bootstrap.flatten(1)
    first, second = flat.nan_to_num(-torch.inf).topk(2).indices.tolist()
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = bootstrap.quantile(ends, dim=0)
    margin_low, margin_high = (resampled[:, first] - resampled[:, second]).quantile(ends).tolist()
    best = resampled.nan_to_num(-torch.inf).argmax(dim=1)
    return Confidence(
        low=low,
        high=high,
        margin=float(flat[first] - flat[second]),
        margin_low=margin_low,
        margin_high=margin_high,
        stability=float((best == first).float().mean()),
        half_agreement=None if halves is None else half_agreement(halves, top_k=top_k),
    )


def half_agreement(halves: Tensor, *, top_k: int) -> float:
    """Share of each layer's K best experts on which two halves agree, mean over layers.

    Args:
        halves: Affinities on the two halves. Shape `(2, L, E)`.
        top_k: K.

    Returns:
        0 to 1; the expectation for unrelated halves is K / E.
    """
    first, second = halves.topk(top_k, dim=-1).indices  # (L, K) each
    shared = (first[:, :, None] == second[:, None, :]).any(dim=-1)  # (L, K)
    return float(shared.float().mean())


def normalised_entropy(token_ratio: Tensor) -> Tensor:
    """How evenly the selections of each layer spread over its experts: 1 for all alike, 0 for one expert.

    Args:
        token_ratio: Share of selections, sum 1 a layer. Shape `(L, E)`.

    Returns:
        Entropy over `log E`. Shape `(L,)`.
    """
    shares = token_ratio / token_ratio.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(shares).sum(dim=-1)
    return entropy / torch.tensor(float(token_ratio.shape[-1])).log()


def top_share(token_ratio: Tensor, *, count: int) -> Tensor:
    """Share of the selections of each layer that falls on its `count` most selected experts. Shape `(L,)`."""
    return token_ratio.topk(count, dim=-1).values.sum(dim=-1)
