"""Memory and time of an unlearning, from a model's configuration alone: no weight is downloaded or made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from uoe_peft.moe import MoEBlock, find_moe_blocks
from uoe_peft.moe.segments import find_layers
from uoe_peft.streaming.memory import BLOCK_BYTES, BLOCKS, experts_per_token, interrupted_bytes, working_bytes
from uoe_peft.streaming.quantisation import without_quantisation

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


@dataclass(frozen=True)
class StreamingPlan:
    """What unlearning one expert takes where decoder layers are read from disk, one at a time.

    Attributes:
        parameters: Of the model.
        checkpoint_gb: Size on disk, in 10^9 bytes.
        layer_gib: Of the largest decoder layer, in the dtype that is computed in.
        attribute_gib: Memory of attribution: a layer while it comes in, hidden states up to 2 GiB, and a batch.
        train_gib: Memory of training: the edited layer stays, too, with what AdamW keeps of its deltas.
        ahead_gib: Memory with which, in either, the next layer is read while one computes.
        blocks_attribute_gib: Memory of attribution where routed experts are read in blocks, as they are where a whole
            layer does not fit: the rest of a layer, blocks, and what experts put out, up to 2 GiB, beside the others.
        blocks_train_gib: Of training, likewise: the edited expert stays, and the rest of its layer.
        states_gib: Hidden states of all tokens; beyond 2 GiB they are in files.
        attribute_seconds: One pass of all rows through all layers.
        train_seconds: RMU in the chosen layer: checks that read the layers two to three times, one pass of all rows
            through the layers below, and the steps.
        adapter_mib: The file that is saved.
    """

    parameters: int
    checkpoint_gb: float
    layer_gib: float
    attribute_gib: float
    train_gib: float
    ahead_gib: float
    blocks_attribute_gib: float
    blocks_train_gib: float
    states_gib: float
    attribute_seconds: float
    train_seconds: float
    adapter_mib: float

    def summary(self) -> str:
        """The plan in a few lines."""
        return "\n".join(
            [
                f"model       {self.parameters / 1e9:8.2f} G parameters, {self.checkpoint_gb:.0f} GB on disk",
                f"memory      {self.attribute_gib:8.1f} GiB to attribute, {self.train_gib:.1f} to train, of which a "
                f"decoder layer takes {self.layer_gib:.1f}; reading ahead takes {self.ahead_gib:.1f} more",
                f"or          {self.blocks_attribute_gib:8.1f} GiB to attribute, {self.blocks_train_gib:.1f} to train, "
                "with experts read in blocks",
                f"disk        {max(0.0, self.states_gib - 2):8.1f} GiB of hidden states beside the checkpoint",
                f"attribute   {self.attribute_seconds / 60:8.1f} min, planned, not measured",
                f"train       {self.train_seconds / 60:8.1f} min with rmu and embed_diff, planned, not measured",
                f"adapter     {self.adapter_mib:8.1f} MiB on disk",
            ]
        )


def plan_streaming(
    config: PreTrainedConfig,
    *,
    layer_idx: int | None = None,
    rows: int = 400,
    tokens_a_row: int = 256,
    batch_size: int = 4,
    epochs: float = 3.0,
    tflops: float = 1.0,
    disk_gb_s: float = 3.0,
    weight_bytes: int = 4,
) -> StreamingPlan:
    """Plan the unlearning of one expert of a model that is read from disk layer by layer.

    Reading and computing overlap, so that a pass through a layer takes as long as the slower of the two. Attention
    scores are left out: for rows of some hundred tokens they are small beside the matrices.

    Args:
        config: Of the model; its quantisation says how large its tensors are on disk.
        layer_idx: Layer of the expert; None: the middle one of those with experts.
        rows: Rows of the forget set; each is paired with a retain row.
        tokens_a_row: Mean length.
        batch_size: Forget rows a forward pass, each with a retain row.
        epochs: Passes over the forget set.
        tflops: Speed that the device reaches on matrix products, 10^12 operations a second.
        disk_gb_s: Speed of the disk, 10^9 bytes a second.
        weight_bytes: Of a weight that is computed with: 4 for float32, 2 for bfloat16.

    Raises:
        UnsupportedModelError: The model has no routed experts.
        ValueError: The layer has no experts.
    """
    model = _without_data(config)
    blocks = {block.layer_idx: block for block in find_moe_blocks(model)}
    chosen = _chosen(blocks, layer_idx)
    layers = [_LayerSize.of(layer, blocks.get(idx), config) for idx, layer in enumerate(find_layers(model).children())]
    parameters = sum(weight.numel() for weight in model.parameters())
    ends = parameters - sum(layer.parameters for layer in layers)
    tokens = 2 * rows * tokens_a_row  # forget and retain
    states = 2 * tokens * int(config.get_text_config().hidden_size) * weight_bytes  # embedded, and inside the layers

    def seconds(part: Sequence[_LayerSize], num_tokens: int) -> float:
        work = ((layer.stored / (disk_gb_s * 1e9), 2 * layer.active * num_tokens / (tflops * 1e12)) for layer in part)
        return sum(map(max, work))

    largest = max(layers, key=lambda layer: layer.parameters)
    reading = largest.parameters * (weight_bytes if largest.is_scaled else min(2, weight_bytes))
    peak = largest.parameters * weight_bytes + reading / 3 + min(2 * _GIB, states)
    peak += working_bytes(model, 2 * batch_size * tokens_a_row, weight_bytes)
    block = blocks[chosen]
    # What experts are read beside: the rest of a layer, or the embedding before it.
    widest = max(*(layer.parameters - layer.experts for layer in layers), _num_parameters(model.get_input_embeddings()))
    in_blocks = peak - (largest.parameters - widest) * (weight_bytes + reading / largest.parameters / 3)
    in_blocks += min(BLOCKS * BLOCK_BYTES, largest.experts * weight_bytes)
    in_blocks += min(2 * _GIB, interrupted_bytes(model, states // 2))
    kept_in_blocks = layers[chosen].parameters - layers[chosen].experts * (1 - 1 / block.num_experts)
    trained = _num_parameters(block.experts) // block.num_experts + block.num_experts * block.hidden_size
    # The model from its beginning, from the edited layer on, and again with what is above it left out; see
    # `uoe_peft.moe.exactness`. The longest and the shortest row take part.
    checks = seconds(layers, 2 * tokens_a_row) + 2 * seconds(layers[chosen:], 2 * tokens_a_row)
    steps = 3 * 2 * layers[chosen].active * tokens * epochs / (tflops * 1e12)  # backward costs two
    return StreamingPlan(
        parameters=parameters,
        checkpoint_gb=(sum(layer.stored for layer in layers) + 2 * ends) / 1e9,
        layer_gib=largest.parameters * weight_bytes / _GIB,
        attribute_gib=peak / _GIB,
        train_gib=(peak + layers[chosen].parameters * weight_bytes + trained * (4 + _OPTIMISER_BYTES)) / _GIB,
        ahead_gib=reading / _GIB,
        blocks_attribute_gib=in_blocks / _GIB,
        blocks_train_gib=(in_blocks + kept_in_blocks * weight_bytes + trained * (4 + _OPTIMISER_BYTES)) / _GIB,
        states_gib=states / _GIB,
        attribute_seconds=seconds(layers, tokens),
        train_seconds=checks + seconds(layers[:chosen], tokens) + steps,
        adapter_mib=trained * 4 / 2**20,
    )


@dataclass(frozen=True)
class _LayerSize:
    """A decoder layer: its weights, those of routed experts, those of a token, and its bytes on disk."""

    parameters: int
    experts: int
    active: float
    stored: float
    is_scaled: bool  # stored in numbers whose scales make them as wide as what is computed in

    @classmethod
    def of(cls, layer: nn.Module, block: MoEBlock | None, config: PreTrainedConfig) -> _LayerSize:
        form = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        parameters = _num_parameters(layer)
        experts = 0 if block is None else _num_parameters(block.experts)
        idle = 0.0 if block is None else 1 - experts_per_token(config, block.num_experts) / block.num_experts
        match form:
            case "fp8":
                stored = float(parameters)
            case "mxfp4":
                stored = experts * 17 / 32 + 2 * (parameters - experts)  # 32 numbers of 4 bits share 8 bits
            case _:
                stored = 2.0 * parameters
        return cls(parameters, experts, parameters - experts * idle, stored, is_scaled=form == "fp8")


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
        batch_size: Forget rows a forward pass, each with a retain row.
        epochs: Passes over the forget set.
        tflops: Speed that the device reaches on such a model, 10^12 operations a second: a third of its peak is good.
        weight_bytes: Of one weight: 2 for bfloat16.

    Raises:
        UnsupportedModelError: The model has no routed experts.
        ValueError: The layer has no experts.
    """
    model = _without_data(config)
    blocks = {block.layer_idx: block for block in find_moe_blocks(model)}
    chosen = _chosen(blocks, layer_idx)
    text: Any = config.get_text_config()
    counts = {index: _num_parameters(block.experts) // block.num_experts for index, block in blocks.items()}
    parameters = sum(weight.numel() for weight in model.parameters())
    idle = sum(
        counts[i] * (block.num_experts - experts_per_token(config, block.num_experts)) for i, block in blocks.items()
    )
    embedding = _num_parameters(model.get_input_embeddings())
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


def _num_parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _without_data(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(without_quantisation(config)))


def _chosen(blocks: Mapping[int, MoEBlock], layer_idx: int | None) -> int:
    chosen = sorted(blocks)[len(blocks) // 2] if layer_idx is None else layer_idx
    if chosen not in blocks:
        raise ValueError(f"layer {chosen} has no routed experts; use one of {sorted(blocks)}")
    return chosen
