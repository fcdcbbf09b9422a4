"""Expert selection shift: do tokens still go to the experts that the base model sends them to?

The paper's finding (Fig. 3a of https://arxiv.org/abs/2411.18797) is that ordinary unlearning moves forget tokens away
from the experts that hold the knowledge. Here it is watched while training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uoe_peft.data import Batch
from uoe_peft.moe.blocks import find_moe_blocks
from uoe_peft.moe.comparison import top_k_jaccard
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.interventions import find_decoder
from uoe_peft.moe.routing import record_routing
from uoe_peft.training.objective.reference import Reference


def selection_overlap(reference: Reference, batch: Batch) -> Tensor:
    """Jaccard overlap of the experts that the model and the base model select, mean over tokens and MoE layers.

    Layers that a prefix cache leaves out are below every edited one, where both select the same: they count as 1.

    Args:
        reference: The model, with an adapter, and its base model.
        batch: Any batch; padding does not count.

    Returns:
        Scalar in [0, 1], without gradient.

    Raises:
        RuntimeError: The model is trained in full.
        UnsupportedModelError: The model has no routed experts.
    """
    model = reference.model
    num_experts = {block.layer_idx: block.num_experts for block in find_moe_blocks(model)}
    with evaluation_mode(model):
        now = _selections(reference, batch)
    with reference.base_model():
        base = _selections(reference, batch)
    mask = batch["attention_mask"]
    overlaps = [
        top_k_jaccard(now[idx], base[idx], num_experts=num_experts[idx], mask=mask.flatten().bool()) for idx in now
    ]
    left_out = sum(idx < min(now) for idx in num_experts)
    return (torch.stack(overlaps).sum() + left_out) / (len(overlaps) + left_out)


def _selections(reference: Reference, batch: Batch) -> dict[int, Tensor]:
    """Selected experts by layer; the LM head is never run."""
    with record_routing(reference.model) as trace:
        find_decoder(reference.model)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        return {layer_idx: trace[layer_idx].top_k_index for layer_idx in trace}
