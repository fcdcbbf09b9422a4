"""Weights in few bits: a small delta may be rounded away, and what it hid comes back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.evaluation.attacks.copies import plain_copy
from uoe_peft.evaluation.attacks.result import AttackResult, CausalLM, Score, Scores, baseline, measured
from uoe_peft.moe import MoEBlock, find_moe_blocks, is_quantised, unwrap


def quantization(
    model: CausalLM,
    *,
    score: Score,
    bits: int,
    group_size: int | None = 128,
    before: Scores | None = None,
) -> AttackResult:
    """Rounds the merged weights of a copy to few bits and back, as serving in int8 or int4 does.

    Quantising restored 21 to 83 % of forgotten knowledge in https://arxiv.org/abs/2410.16454. Every linear layer and
    every routed expert is rounded, stacked ones too, which torchao and bitsandbytes leave as they are; output head,
    embeddings and routers keep their bits, as serving libraries leave them. Rounding is to nearest; methods that fit
    the rounding to data (GPTQ, AWQ) are not tried. Activations keep their bits.

    Args:
        model: Any causal language model.
        score: Measures forget and retain.
        bits: 2 to 8; "int8" and "int4" are 8 and 4.
        group_size: Consecutive inputs of an output that share a scale; None: all of them.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        After: scores of the rounded copy.

    Raises:
        UnsupportedModelError: Weights are quantised already, or experts are stored in an unknown way.
        ValueError: `bits` or `group_size` is out of range, weights are offloaded, an adapter cannot be merged, or a
            score is not finite.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be at least 1, or None for a whole row, got {group_size}")
    start = baseline(score, model, before)
    copied = plain_copy(model)
    num_rounded = 0
    with torch.no_grad():
        for weight in _matrices(copied):
            weight.copy_(round_trip(weight, bits=bits, group_size=group_size))
            num_rounded += weight.numel()
    settings = {
        "bits": int(bits),
        "group_size": None if group_size is None else int(group_size),
        "rounding": "to nearest, symmetric, a scale a group",
        "share_of_weights": num_rounded / copied.num_parameters(),
    }
    return AttackResult(f"int{bits}", before=start, after=measured(score, copied), settings=settings)


def round_trip(weight: Tensor, *, bits: int, group_size: int | None) -> Tensor:
    """A matrix as it comes out of few bits: `s * round(w / s)` with `s = max|w| / (2^(bits - 1) - 1)` of each group.

    Computed in float32 and rounded once to the weight's dtype.

    Args:
        weight: Shape `(out, in)`.
        bits: Of a weight; values are from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
        group_size: Consecutive inputs that share a scale, the last ones fewer where it does not divide `in`; None: all.

    Returns:
        Shape `(out, in)`, in the weight's dtype.
    """
    rows, columns = weight.shape
    size = min(group_size or columns, columns)
    groups = F.pad(weight.float(), (0, -columns % size)).view(rows, -1, size)  # zeros never widen a group's range
    scale = groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)  # (out, groups, 1)
    rounded = torch.where(scale > 0, (groups / scale).round() * scale, groups)
    return rounded.view(rows, -1)[:, :columns].to(weight.dtype)


def _matrices(model: PreTrainedModel) -> Iterator[Tensor]:
    """What is rounded: views of shape `(out, in)`, each once."""
    blocks = _blocks(model)
    kept = {id(parameter) for block in blocks for parameter in unwrap(block.router).parameters()}
    kept |= {id(parameter) for head in (model.get_output_embeddings(),) if head for parameter in head.parameters()}
    for block in blocks:
        for projection in block.storage.projections:
            for expert_idx in range(block.num_experts):
                stored = block.storage.parameter(projection, expert_idx)
                kept.add(id(stored))
                _check(stored, block.experts_name)
                weight = block.storage.weight(projection, expert_idx)
                yield weight.transpose(0, 1) if block.storage.is_transposed(projection) else weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in kept:
            kept.add(id(module.weight))
            _check(module.weight, name)
            yield module.weight


def _blocks(model: PreTrainedModel) -> list[MoEBlock]:
    try:
        return find_moe_blocks(model)
    except UnsupportedModelError:
        if any(parameter.dim() == 3 and min(parameter.shape) > 1 for parameter in model.parameters()):
            raise  # stacked experts that cannot be read; a convolution that mixes no channels has a dimension of 1
        return []  # a dense model: linear layers are all there is


def _check(weight: Tensor, name: str) -> None:
    if is_quantised(weight):
        raise UnsupportedModelError(f"{name} is quantised already ({weight.dtype}); load the model in bfloat16")
