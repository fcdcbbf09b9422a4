"""How much memory there is, and how much a pass through a layer takes."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from uoe_peft.moe import find_moe_blocks

GIB = 2**30

# Of experts that are read in blocks. A larger block is no faster: reading and computing overlap.
BLOCK_BYTES = GIB
# At a time: one that computes, one that is read, and what either is made of.
BLOCKS = 3

# What a token takes inside a layer beside its experts: norms, queries, keys, values, scores and residuals, in hidden
# sizes.
_WIDTHS = 10


def available_memory() -> int | None:
    """Bytes that this process may still take, what a container allows included; None where the system does not say."""
    left = [bytes_left for bytes_left in (_system_leaves(), _container_leaves()) if bytes_left is not None]
    return min(left, default=None)


def working_bytes(model: PreTrainedModel, num_tokens: int, itemsize: int) -> int:
    """About what a batch takes inside a layer: an estimate, within a factor of two.

    Args:
        model: With routed experts.
        num_tokens: Of the batch, padding included.
        itemsize: Bytes of a number.
    """
    block = find_moe_blocks(model)[-1]
    expert = sum(parameter.numel() for parameter in block.experts.parameters()) // block.num_experts
    # Between its matrices, an expert holds as many numbers for a token as it has rows of hidden size, and one result.
    routed = experts_per_token(model.config, block.num_experts) * (expert // block.hidden_size + 2 * block.hidden_size)
    return num_tokens * (routed + _WIDTHS * block.hidden_size) * itemsize


def interrupted_bytes(model: PreTrainedModel, state_bytes: int) -> int:
    """What passes take that wait inside a layer for its experts, given the size of their hidden states.

    For a token that is what each of its experts puts out, what they are called with, and what came before.
    """
    return (experts_per_token(model.config, find_moe_blocks(model)[0].num_experts) + 2) * state_bytes


def experts_per_token(config: PreTrainedConfig, num_experts: int) -> int:
    """How many experts a token is sent to, under whichever name the configuration has it; at worst all of them."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "experts_top_k")
    return next((int(getattr(text, name)) for name in names if getattr(text, name, None)), num_experts)


def _system_leaves() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container_leaves() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        return limit - int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or none with a limit ("max")
        return None
