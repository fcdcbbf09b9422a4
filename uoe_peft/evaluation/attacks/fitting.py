"""Training inside an attack: rows in a fixed order, answer tokens, AdamW at a constant rate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from tqdm import tqdm

from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.evaluation.attacks.result import CausalLM
from uoe_peft.losses.answer_tokens import answer_positions, answer_targets, mean, token_log_probs

Example = dict[str, Any]


def fit(
    model: CausalLM,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    desc: str,
) -> Iterator[int]:
    """Train parameters of a model on the answers of rows, in the mode that the model is in.

    AdamW without weight decay; cross-entropy, averaged over the answer tokens of a step.

    Args:
        model: The model.
        parameters: What is trained.
        examples: Rows with `input_ids` and `labels`.
        num_steps: Steps in all.
        learning_rate: The same at each step.
        batch_size: Rows a step; always so many, so that a small set is seen more often and not in smaller steps.
        seed: Of the order of the rows.
        desc: Title of the progress bar.

    Yields:
        The number of steps done, 1 to `num_steps`.

    Raises:
        ValueError: The loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    order = _endless_order(len(examples), seed=seed)
    for step in tqdm(range(1, num_steps + 1), desc=desc, unit="step", leave=False):
        with torch.enable_grad():
            loss = answer_loss(model, [examples[next(order)] for _ in range(batch_size)])
        if not torch.isfinite(loss):
            raise ValueError(f"{desc}: the loss of step {step} is {loss.item()}; lower learning_rate={learning_rate}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def answer_loss(model: CausalLM, examples: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of the answer tokens of some rows, in nats. Scalar."""
    batch = {name: tensor.to(model.device) for name, tensor in collate(examples, pad_token_id=0).items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"].to(logits.device)  # of a model on several devices, the last one
    targets, _ = answer_targets(labels)
    return -mean(token_log_probs(logits[answer_positions(labels)], targets))


def rows_to_fit(
    dataset: Dataset | IterableDataset, processing_class: ProcessingClass, *, max_length: int | None, name: str
) -> list[Example]:
    """The tokenised rows of a set that an attack trains on.

    Raises:
        TypeError: `dataset` is no `Dataset`, or `processing_class` neither tokenizer nor processor.
        ValueError: The set is empty, or has no usable columns or answers.
    """
    return [dict(row) for row in tokenize_dataset(dataset, processing_class, max_length=max_length, name=name)]


def checked_steps(steps: Sequence[int]) -> list[int]:
    """Numbers of steps after which is measured, as plain integers.

    Raises:
        ValueError: There are none, or they are not ascending integers >= 1.
    """
    try:
        plain = [index(step) for step in steps]
    except TypeError:
        plain = []
    if not plain or plain[0] < 1 or sorted(set(plain)) != plain:
        raise ValueError(f"steps must be ascending integers >= 1, such as (6, 12, 24), got {steps!r}")
    return plain


def check_budget(*, batch_size: int, learning_rate: float) -> None:
    """Refuse a budget that trains nothing.

    Raises:
        ValueError: `batch_size` is below 1, or `learning_rate` not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {learning_rate}")


def _endless_order(num_rows: int, *, seed: int) -> Iterator[int]:
    """Permutations of the rows, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_rows, generator=generator).tolist()
