"""Expert selection shift: do tokens still go to the experts that they went to before?

The paper's finding (Fig. 3a of https://arxiv.org/abs/2411.18797) is that ordinary unlearning moves forget tokens away
from the experts that hold the knowledge.

Letters: T = B * S tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uoe_peft.moe.blocks import find_moe_blocks
from uoe_peft.moe.comparison import top_k_jaccard
from uoe_peft.moe.interventions import find_runnable
from uoe_peft.moe.routing import record_routing

Selections = dict[int, Tensor]
"""Selected experts by decoder layer, each of shape `(T, K)`."""


def selected_experts(model: nn.Module, inputs: Mapping[str, Tensor]) -> Selections:
    """The experts that each layer selects for a batch; the LM head is never run.

    Args:
        model: Any model with routed experts, as it is: training mode and autograd are the caller's.
        inputs: `input_ids` and `attention_mask`.

    Raises:
        UnsupportedModelError: The model has no routed experts.
    """
    with record_routing(model) as trace:
        find_runnable(model)(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return {layer_idx: trace[layer_idx].top_k_index for layer_idx in trace}


def selection_overlap(model: nn.Module, now: Selections, before: Selections, *, mask: Tensor) -> Tensor:
    """Jaccard overlap of two selections of the same batch, mean over tokens and Mixture-of-Experts layers.

    Layers below the first that ran, which a prefix cache leaves out, count as 1: nothing is edited there.

    Args:
        model: What selected them.
        now: Of one pass.
        before: Of the other.
        mask: Tokens that count. Shape `(B, S)`.

    Returns:
        Scalar in [0, 1], without gradient, on the mask's device.
    """
    num_experts = {block.layer_idx: block.num_experts for block in find_moe_blocks(model)}
    overlaps = [
        top_k_jaccard(now[idx], before[idx].to(now[idx].device), num_experts=num_experts[idx], mask=mask) for idx in now
    ]
    left_out = sum(idx < min(now) for idx in num_experts)
    return (torch.stack([overlap.to(mask.device) for overlap in overlaps]).sum() + left_out) / (len(now) + left_out)
