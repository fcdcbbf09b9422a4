"""The causal score: how much the loss rises when an expert contributes nothing.

Letters: B sequences of a batch, N candidate experts, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from uoe_peft.attribution.expert_use import input_device, progress_bar
from uoe_peft.attribution.sampling import SampleBatches
from uoe_peft.attribution.streaming import SequenceMean
from uoe_peft.data import IGNORE_INDEX, Batch
from uoe_peft.data.shares import Share
from uoe_peft.moe.blocks import MoEBlock
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.interventions import silence_expert
from uoe_peft.moe.routing import select_blocks

Pair = tuple[int, int]


def measure_loss_rise(
    model: nn.Module,
    batches: SampleBatches,
    candidates: Sequence[Pair],
    *,
    num_resamples: int = 200,
    seed: int = 0,
    name: str = "forget",
    show_progress: bool = False,
) -> SequenceMean:
    """Rise of each sequence's loss when one candidate expert contributes zero, averaged over sequences.

    The loss is the mean negative log-likelihood of the sequence's answer tokens, in nats. Costs N + 1 whole forward
    passes over the set, LM head included. Processes that each have the whole model share the batches out.

    Args:
        model: A causal language model with routed experts.
        batches: The set.
        candidates: Experts to silence, one at a time, N of them.
        num_resamples: Number of bootstrap resamples.
        seed: Of the resamples.
        name: What the progress bar calls this set.
        show_progress: Whether to show a progress bar.

    Returns:
        Statistics of shape `(N,)`.

    Raises:
        ValueError: The model has no LM head; a loss is NaN or infinite.
        UnsupportedModelError: The model has no routed experts.
        RuntimeError: Another process has failed.
    """
    blocks = {block.layer_idx: block for block in select_blocks(model)}
    rise = SequenceMean((len(candidates),), num_resamples=num_resamples, seed=seed)
    share = Share.of(model)
    own = batches.part(share)
    num_tokens = own.num_tokens * (len(candidates) + 1)
    with (
        share.failing_together(),
        evaluation_mode(model),
        progress_bar(num_tokens, f"Silencing experts on {name} set", show=show_progress) as bar,
    ):
        for index, batch in enumerate(own):
            rise.leave_out(share.left_out_before(index), batches.batch_size)
            rise.add(_rises(model, batch, blocks, candidates, bar))
    rise.put_together(share)
    return rise


def answer_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of each sequence's answer tokens, in nats. Shape `(B,)`, float32.

    Raises:
        ValueError: The model has no LM head.
    """
    device = input_device(model)
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    output: Any = model(**inputs, use_cache=False)
    if getattr(output, "logits", None) is None:
        raise ValueError(
            f"{type(model).__name__} returns no logits; load it with its LM head, as AutoModelForCausalLM does"
        )
    logits = output.logits[:, :-1]
    labels = batch["labels"][:, 1:].to(logits.device)
    answers = labels != IGNORE_INDEX
    # Only the answers' rows in float32: the whole tensor of logits would be the largest thing in memory.
    losses = F.cross_entropy(logits[answers].float(), labels[answers], reduction="none")
    row = answers.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add_(0, row, losses) / answers.sum(dim=1)


def _rises(
    model: nn.Module, batch: Batch, blocks: dict[int, MoEBlock], candidates: Sequence[Pair], bar: tqdm
) -> Tensor:
    """Shape `(B, N)`, on the CPU."""
    num_tokens = int(batch["attention_mask"].sum())
    base = answer_losses(model, batch)
    bar.update(num_tokens)
    rises = []
    for layer_idx, expert_idx in candidates:
        with silence_expert(blocks[layer_idx], expert_idx):
            rises.append(answer_losses(model, batch) - base)
        bar.update(num_tokens)
    stacked = torch.stack(rises, dim=1).cpu()
    if not stacked.isfinite().all():
        raise ValueError("the model's loss is NaN or infinite, expected a finite one; check the checkpoint and dtype")
    return stacked
