"""Three ways of writing factors of single experts as LoRA.

Letters: E experts of a layer, R rank, `in` and `out` sizes of a matrix.

- `peft`: one pair for a stack of experts, `lora_A (E * R, in)` with the expert slowest and `lora_B (out, R * E)` with
  the expert fastest. Read by PEFT from 0.19 on, and by vLLM for the few families whose checkpoints are fused.
- `per_expert`: a pair for each matrix of each expert, named as in the checkpoint, `lora_A (R, in)` and
  `lora_B (out, R)`. Read by vLLM, SGLang and llama.cpp's converter.
- of a dense model that was factorized: a pair for each of its linear layers that changes, zero outside the neurons.

An order of `lora_B` that puts the expert slowest loads without a word and adds the deltas of other experts.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.export.disk_layout import disk_pieces
from uoe_peft.export.edits import expert_slice
from uoe_peft.export.factors import Factors
from uoe_peft.export.neurons import NeuronEdit, neuron_edits
from uoe_peft.moe import MoEBlock, find_moe_blocks

MAX_SERVED_RANK = 512  # of vLLM 0.33

Tensors = dict[str, Tensor]


def peft_layout(
    model: PreTrainedModel, factors: Sequence[Factors], base_name: str | None
) -> tuple[LoraConfig, Tensors]:
    """Configuration and tensors for stock PEFT, whose `target_parameters` are the edited parameters.

    Args:
        model: The base model; its parameters may be on the meta device.
        factors: Of the edited slices.
        base_name: What the configuration says of the base model.

    Raises:
        ValueError: Experts are stored in another way than stacked.
    """
    by_parameter: dict[str, list[Factors]] = defaultdict(list)
    for one in factors:
        by_parameter[one.edit.target.parameter].append(one)
    for parameter, group in by_parameter.items():
        if group[0].edit.expert_idx is not None and model.get_parameter(parameter).dim() != 3:
            raise ValueError(
                f'format="peft" needs experts that are stacked, unlike {parameter}; ship the merged weights'
            )
    ranks = {parameter: max(one.rank for one in group) for parameter, group in by_parameter.items()}
    config = _config(None, rank=max(ranks.values()), target_modules=[])
    config.target_parameters = sorted(by_parameter)
    config.rank_pattern = {parameter: rank for parameter, rank in ranks.items() if rank != config.r}
    alphas = {parameter: by_parameter[parameter][0].scale * rank for parameter, rank in ranks.items()}
    config.alpha_pattern = {parameter: alpha for parameter, alpha in alphas.items() if alpha != config.lora_alpha}
    with torch.device("meta"), warnings.catch_warnings():
        # PEFT looks for ranks of parameters among the modules, says that it ignores them, and takes them.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        wrapped = get_peft_model(model, config)
    config.base_model_name_or_path = base_name  # PEFT has put the model's there
    tensors = {}
    for path, module in wrapped.named_modules():
        if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
            group = by_parameter[_parameter_path(path, cast(str, module.parameter_name))]
            factor_a, factor_b = _stacked(module, group)
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = factor_a, factor_b
    return config, tensors


def per_expert_layout(
    model: PreTrainedModel, factors: Sequence[Factors], base_name: str | None
) -> tuple[LoraConfig, Tensors]:
    """Configuration and tensors named as the checkpoint names single matrices, all experts of the edited layers.

    Servers want all experts present and of one rank: those that are not edited get zeros.

    Args:
        model: The base model; its parameters may be on the meta device.
        factors: Of the edited slices of experts.
        base_name: What the configuration says of the base model.

    Raises:
        ValueError: The family's checkpoint has no matrices of single experts, or the rank is more than is served.
    """
    rank = max(one.rank for one in factors)
    if rank > MAX_SERVED_RANK:
        raise ValueError(f"rank {rank} is more than the {MAX_SERVED_RANK} that servers take; name a smaller rank")
    edited = {(one.edit.layer_idx, one.edit.projection, one.edit.expert_idx): one for one in factors}
    layers = {one.edit.layer_idx for one in factors}
    tensors: Tensors = {}
    for block in find_moe_blocks(model):
        if block.layer_idx not in layers:
            continue
        for projection in block.storage.projections:
            for expert_idx in range(block.num_experts):
                found = edited.get((block.layer_idx, projection, expert_idx))
                tensors |= _of_expert(model, block, projection, expert_idx, found, rank)
    modules = sorted({name.split(".")[-3] for name in tensors})
    return _config(base_name, rank=rank, target_modules=modules), tensors


def dense_layout(
    model: PreTrainedModel, factors: Sequence[Factors], base_name: str | None
) -> tuple[LoraConfig, Tensors]:
    """Configuration and tensors for the dense model itself, whose linear layers any LoRA may edit.

    Args:
        model: The factorized model; its parameters may be on the meta device.
        factors: Of the edited groups.
        base_name: What the configuration says of the base model.
    """
    by_place = {(one.edit.target.parameter, one.edit.expert_idx): one for one in factors}
    tensors: Tensors = {}
    ranks: list[int] = []
    for matrix, edits in neuron_edits([one.edit for one in factors], model).items():
        pairs = [_of_neurons(edit, by_place[edit.edit.target.parameter, edit.edit.expert_idx]) for edit in edits]
        name = f"base_model.model.{matrix.removesuffix('.weight')}"
        # Groups of one layer add up: [B_1 B_2] [A_1; A_2].
        tensors[f"{name}.lora_A.weight"] = torch.cat([factor_a for factor_a, _ in pairs])
        tensors[f"{name}.lora_B.weight"] = torch.cat([factor_b for _, factor_b in pairs], dim=1)
        ranks.append(sum(len(factor_a) for factor_a, _ in pairs))
    modules = [n.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n]
    config = _config(base_name, rank=max(ranks), target_modules=modules)
    config.rank_pattern = {name: rank for name, rank in zip(modules, ranks, strict=True) if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    return config, tensors


def _of_neurons(edit: NeuronEdit, factors: Factors) -> tuple[Tensor, Tensor]:
    """`lora_A (R, in)` and `lora_B (out, R)` of one group's part of a dense matrix; groups are stored transposed."""
    factor_a = factors.left[edit.rows.start : edit.rows.stop].T  # (R, in of the group)
    factor_b = factors.scale * factors.right[:, edit.columns.start : edit.columns.stop].T  # (out of the group, R)
    if edit.dim == 1:  # neurons are inputs
        whole = factor_a.new_zeros(factors.rank, edit.num_neurons)
        return whole.index_copy_(1, edit.neurons, factor_a), factor_b
    whole = factor_b.new_zeros(edit.num_neurons, factors.rank)
    return factor_a, whole.index_copy_(0, edit.neurons, factor_b)


def _of_expert(
    model: PreTrainedModel, block: MoEBlock, projection: str, expert_idx: int, factors: Factors | None, rank: int
) -> Tensors:
    """Pairs for the matrices that one slice is on disk."""
    tensors = {}
    for piece in disk_pieces(model, expert_slice(block, projection, expert_idx)):
        if len(piece.shape) != 2 or not piece.tensor.endswith(".weight"):
            raise ValueError(
                f"{piece.tensor} holds all experts: the checkpoints of this family have no matrix of a single one, so "
                'that format="per_expert" has no names for them; use format="peft", or ship the merged weights'
            )
        rows, columns = piece.shape
        factor_a, factor_b = torch.zeros(rank, columns), torch.zeros(rows, rank)
        if factors is not None:
            left = factors.scale * factors.left[piece.rows.start : piece.rows.stop : piece.rows.step]
            right = factors.right[:, piece.columns.start : piece.columns.stop : piece.columns.step]
            left, right = (right.T, left.T) if piece.transposed else (left, right)
            factor_a[: factors.rank], factor_b[:, : factors.rank] = right, left
        name = f"base_model.model.{piece.tensor.removesuffix('.weight')}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = factor_a, factor_b
    return tensors


def _stacked(module: nn.Module, group: Iterable[Factors]) -> tuple[Tensor, Tensor]:
    """`lora_A (E * R, in)` and `lora_B (out, R * E)` of one parameter, as PEFT has sized them."""
    layer = cast(Any, module)
    num_experts, rank = layer.num_experts, layer.r["default"]
    factor_a = torch.zeros(num_experts, rank, layer.in_features)
    factor_b = torch.zeros(layer.out_features, rank, num_experts)
    stored_in_out = num_experts > 1 and bool(getattr(layer.get_base_layer(), "is_transposed", False))
    for one in group:
        expert_idx = one.edit.expert_idx or 0
        left, right = (one.right.T, one.left.T) if stored_in_out else (one.left, one.right)
        factor_a[expert_idx, : one.rank] = right
        factor_b[:, : one.rank, expert_idx] = left
    return factor_a.flatten(0, 1), factor_b.flatten(1, 2)


def _parameter_path(wrapper_path: str, parameter_name: str) -> str:
    """Path of the wrapped parameter in the base model; wrappers of one module are nested."""
    module = wrapper_path.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{module}.{parameter_name}"


def _config(base_name: str | None, *, rank: int, target_modules: list[str]) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base_name,
        r=rank,
        lora_alpha=rank,  # scale 1: the factors hold it
        lora_dropout=0.0,
        target_modules=target_modules,
        inference_mode=True,
    )
