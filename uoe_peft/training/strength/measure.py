"""What a model still knows of some rows: by forward passes, as it is or after a short relearning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from peft import PeftModel
from torch import nn

from uoe_peft.data import Batch
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.lm_head import independent_copy
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.strength.options import Metric

# The relearning attack of the literature, shortened: AdamW on all weights, https://arxiv.org/abs/2606.17168.
_LOOKS = (6, 12)
_LEARNING_RATE = 2e-4


def known(model: nn.Module, batches: Iterable[Batch], metric: Metric, *, logits_at_once: int | None = None) -> float:
    """How much of the answers a model knows, in [0, 1]; without dropout.

    Args:
        model: A causal language model.
        batches: Rows with answers.
        metric: "accuracy": share of all answer tokens that are the most likely ones. "probability": mean over answers
            of the geometric mean of their tokens' probabilities.
        logits_at_once: See `forward_answers`.

    Raises:
        ValueError: No row has an answer.
    """
    total, count = 0.0, 0
    with evaluation_mode(model):
        for batch in batches:
            outputs = forward_answers(model, batch, logits_at_once=logits_at_once)
            if not len(outputs.targets):
                continue
            if metric == "accuracy":
                total += float(outputs.accuracy) * len(outputs.targets)
                count += len(outputs.targets)
            else:
                answered = outputs.lengths > 0
                total += float(outputs.nll("mean")[answered].double().neg().exp().sum())
                count += int(answered.sum())
    if not count:
        raise ValueError("no row that strengths are tried on has an answer")
    return total / count


def known_after_relearning(model: nn.Module, learned: Sequence[Batch], asked: Callable[[nn.Module], float]) -> float:
    """The most that a copy of a model knows while it learns a few rows again; the model itself stays as it is.

    AdamW with a constant rate on all weights, in float32 and without dropout: in 16 bits most of an update would be
    rounded away, and forgetting would look deeper than it is.

    Args:
        model: The model; adapters are merged in the copy.
        learned: What it learns from, a batch a step, again and again.
        asked: What is measured, on other rows.

    Raises:
        ValueError: Weights are offloaded, so that they cannot be copied.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("calibrate_against='relearning' copies the model, and some of its weights are offloaded")
    copied = independent_copy(model)
    plain = cast(nn.Module, copied.merge_and_unload() if isinstance(copied, PeftModel) else copied)
    plain = plain.float().requires_grad_(True).eval()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=_LEARNING_RATE, weight_decay=0.0)
    most = 0.0
    for step in range(1, _LOOKS[-1] + 1):
        with torch.enable_grad():
            outputs = forward_answers(plain, learned[(step - 1) % len(learned)])
            outputs.log_probs.mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in _LOOKS:
            most = max(most, asked(plain))
    return most
