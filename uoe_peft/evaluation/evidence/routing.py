"""Do tokens still go to the experts that the base model sends them to?

The paper's finding (Fig. 3a and 4 of https://arxiv.org/abs/2411.18797) is that ordinary unlearning moves forget tokens
away from the experts that hold the knowledge. Both routings are recorded in the passes that measure likelihood, so they
cost no pass of their own.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.comparison import kl_divergence, selection_frequencies, top_k_jaccard
from uoe_peft.moe.routing import RoutingTrace


@dataclass(frozen=True)
class LayerShift:
    """Routing of one layer on one set, with the adapter off and on.

    Attributes:
        set_name: Which set.
        layer_idx: Decoder layer.
        jaccard: Overlap of the experts that both select for the same token, mean over tokens, in [0, 1].
        kl: Kullback-Leibler divergence of the selection frequencies, off from on, in nats.
        activation_off: Share of tokens that reach each expert, adapter off. E numbers.
        activation_on: The same, adapter on.
        affinity_off: Mean gate score of each expert (Eq. 2), adapter off. E numbers.
        affinity_on: The same, adapter on.
    """

    set_name: str
    layer_idx: int
    jaccard: float
    kl: float
    activation_off: tuple[float, ...]
    activation_on: tuple[float, ...]
    affinity_off: tuple[float, ...]
    affinity_on: tuple[float, ...]


class RoutingRecord:
    """What one model routes on one set, batch by batch. Padding is left out.

    Args:
        num_experts: E of each decoder layer with routed experts.
    """

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        self.num_experts = dict(num_experts)
        self.selections: dict[int, list[Tensor]] = {layer_idx: [] for layer_idx in num_experts}  # each (T, K)
        self.affinity_sums = {layer_idx: torch.zeros(count) for layer_idx, count in num_experts.items()}
        self.num_sequences = 0

    def add(self, trace: RoutingTrace, mask: Tensor) -> None:
        """Record a batch. Args: mask: 1 on tokens, 0 on padding. Shape `(B, S)`."""
        flat = mask.flatten().bool()
        self.num_sequences += len(mask)
        for layer_idx in self.num_experts:
            layer = trace[layer_idx]
            self.selections[layer_idx].append(layer.top_k_index[flat].to("cpu", torch.int32))
            scores = layer.scores[:, : self.num_experts[layer_idx]]
            gates = torch.zeros_like(scores).scatter(
                1, layer.top_k_index, scores.gather(1, layer.top_k_index)
            )  # (T, E)
            kept = (gates * flat[:, None]).view(*mask.shape, -1)  # (B, S, E)
            means = kept.sum(1) / mask.sum(1, keepdim=True)  # (B, E)
            self.affinity_sums[layer_idx] += means.sum(0).float().cpu()

    def selected(self, layer_idx: int) -> Tensor:
        """Selected experts of all tokens. Shape `(T, K)`, int64."""
        return torch.cat(self.selections[layer_idx]).long()


def has_routed_experts(model: nn.Module) -> dict[int, int]:
    """E by decoder layer; empty for a model without routed experts."""
    try:
        return {block.layer_idx: block.num_experts for block in find_moe_blocks(model)}
    except UnsupportedModelError:
        return {}


def routing_shifts(off: Mapping[str, RoutingRecord], on: Mapping[str, RoutingRecord]) -> tuple[LayerShift, ...]:
    """How far the routings of the same batches differ, by set and layer.

    Args:
        off: What the base model routes, by set.
        on: What the unlearned model routes, by set.
    """
    return tuple(
        _shift(name, layer_idx, record, on[name]) for name, record in off.items() for layer_idx in record.num_experts
    )


def _shift(name: str, layer_idx: int, off: RoutingRecord, on: RoutingRecord) -> LayerShift:
    num_experts = off.num_experts[layer_idx]
    before, after = off.selected(layer_idx), on.selected(layer_idx)
    frequencies = [selection_frequencies(index, num_experts=num_experts) for index in (before, after)]
    per_token = before.shape[-1]
    return LayerShift(
        set_name=name,
        layer_idx=layer_idx,
        jaccard=float(top_k_jaccard(before, after, num_experts=num_experts)),
        kl=float(kl_divergence(*frequencies)),
        activation_off=tuple((frequencies[0] * per_token).tolist()),
        activation_on=tuple((frequencies[1] * per_token).tolist()),
        affinity_off=tuple((off.affinity_sums[layer_idx] / off.num_sequences).tolist()),
        affinity_on=tuple((on.affinity_sums[layer_idx] / on.num_sequences).tolist()),
    )
