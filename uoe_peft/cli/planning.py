"""Memory and time of an unlearning, from a model's configuration alone: no weight is downloaded or made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from uoe_peft.moe import find_moe_blocks

_OPTIMISER_BYTES = 4 + 8  # of a trained weight in float32: its gradient, and AdamW's two moments
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What unlearning one expert takes.

    Attributes:
        parameters: Of the model.
        active_parameters: That one token is multiplied with.
        trained_parameters: Of the expert and of its router.
        weights_gib: Memory of the model's weights.
        training_gib: Of the deltas, their gradients and AdamW's moments, in float32.
        activations_gib: Of the hidden states and of the logits that one step keeps; an estimate, within a factor of
            two.
        adapter_mib: The file that is saved.
        step_share: Cost of a step from the prefix cache over one of the whole model, forward and backward.
        seconds: Of training at the given speed, the passes that fill the cache included.
    """

    parameters: int
    active_parameters: int
    trained_parameters: int
    weights_gib: float
    training_gib: float
    activations_gib: float
    adapter_mib: float
    step_share: float
    seconds: float

    def summary(self) -> str:
        """The plan in a few lines."""
        memory = self.weights_gib + self.training_gib + self.activations_gib
        return "\n".join(
            [
                f"model       {self.parameters / 1e9:8.2f} G parameters, {self.active_parameters / 1e9:.2f} G a token",
                f"trained     {self.trained_parameters / 1e6:8.2f} M parameters: one expert and its router",
                f"memory      {memory:8.1f} GiB: weights {self.weights_gib:.1f}, training {self.training_gib:.2f}, "
                f"activations about {self.activations_gib:.1f}",
                f"adapter     {self.adapter_mib:8.1f} MiB on disk",
                f"step        {self.step_share:8.0%} of the whole model's, from the prefix cache",
                f"time        {self.seconds / 60:8.1f} min, planned, not measured",
            ]
        )


def plan_unlearning(
    config: PreTrainedConfig,
    *,
    layer_idx: int | None = None,
    rows: int = 400,
    tokens_a_row: int = 256,
    batch_size: int = 4,
    epochs: float = 3.0,
    tflops: float = 100.0,
    weight_bytes: int = 2,
) -> Plan:
    """Plan the unlearning of one expert with a full delta, on one device.

    Args:
        config: Of the model.
        layer_idx: Layer of the expert; None: the middle one of those with experts.
        rows: Rows of the forget set; each is paired with a retain row.
        tokens_a_row: Mean length.
        batch_size: Forget rows a forward pass.
        epochs: Passes over the forget set.
        tflops: Speed that the device reaches on such a model, 10^12 operations a second: a third of its peak is good.
        weight_bytes: Of one weight: 2 for bfloat16.

    Raises:
        UnsupportedModelError: The model has no routed experts.
        ValueError: The layer has no experts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = {block.layer_idx: block for block in find_moe_blocks(model)}
    chosen = sorted(blocks)[len(blocks) // 2] if layer_idx is None else layer_idx
    if chosen not in blocks:
        raise ValueError(f"layer {chosen} has no routed experts; use one of {sorted(blocks)}")
    text: Any = config.get_text_config()
    counts = {index: _expert_parameters(block.experts) // block.num_experts for index, block in blocks.items()}
    parameters = sum(weight.numel() for weight in model.parameters())
    idle = sum(counts[i] * (block.num_experts - _top_k(text, block.num_experts)) for i, block in blocks.items())
    embedding = model.get_input_embeddings().weight.numel()
    active = parameters - idle - embedding * (not getattr(text, "tie_word_embeddings", False))
    trained = counts[chosen] + blocks[chosen].num_experts * blocks[chosen].hidden_size
    share = (text.num_hidden_layers - chosen) / text.num_hidden_layers
    tokens = 2 * rows * tokens_a_row  # forget and retain
    operations = 2 * active * tokens * (1 + 3 * share * epochs)  # one pass fills the cache; backward costs two
    kept = (
        2 * batch_size * tokens_a_row * (text.hidden_size * 16 * text.num_hidden_layers * share + 3 * text.vocab_size)
    )
    return Plan(
        parameters=parameters,
        active_parameters=active,
        trained_parameters=trained,
        weights_gib=parameters * weight_bytes / _GIB,
        training_gib=trained * (4 + _OPTIMISER_BYTES) / _GIB,
        activations_gib=kept * weight_bytes / _GIB,
        adapter_mib=trained * 4 / 2**20,
        step_share=share,
        seconds=operations / (tflops * 1e12),
    )


def _expert_parameters(experts: nn.Module) -> int:
    return sum(weight.numel() for weight in experts.parameters())


def _top_k(config: Any, num_experts: int) -> int:
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "experts_top_k")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), num_experts)
