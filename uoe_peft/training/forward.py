"""A forward pass over a batch -> its answer tokens.

Letters: B batch, S sequence, V vocabulary, H hidden size, N answer tokens of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft.data import Batch
from uoe_peft.losses import answer_lengths, answer_positions, answer_targets, sequence_nll, token_log_probs
from uoe_peft.losses.answers import SequenceReduction
from uoe_peft.moe import find_moe_blocks


@dataclass(frozen=True, eq=False)
class AnswerOutputs:
    """What a model says of a batch's answer tokens.

    Attributes:
        logits: With which each answer token is predicted. Shape `(N, V)`.
        targets: The answer tokens. Shape `(N,)`.
        rows: The example that each belongs to, 0 to B - 1. Shape `(N,)`.
        num_examples: B.
        hidden: Hidden states from which answer tokens are predicted, after the layer asked for. Shape `(N, H)`.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor
    num_examples: int
    hidden: Tensor | None = None

    @cached_property
    def log_probs(self) -> Tensor:
        """Log-probability of each answer token. Shape `(N,)`."""
        return token_log_probs(self.logits, self.targets)

    @property
    def accuracy(self) -> Tensor:
        """Share of the answer tokens that are the most likely ones. Scalar."""
        return (self.logits.detach().argmax(dim=-1) == self.targets).float().mean()

    def nll(self, reduction: SequenceReduction = "sum") -> Tensor:
        """Negative log-likelihood of each answer. Shape `(B,)`."""
        return sequence_nll(self.log_probs, self.rows, num_examples=self.num_examples, reduction=reduction)

    @property
    def lengths(self) -> Tensor:
        """Number of answer tokens of each example. Shape `(B,)`."""
        return answer_lengths(self.rows, num_examples=self.num_examples)


def forward_answers(model: nn.Module, batch: Batch, *, hidden_layer: int | None = None) -> AnswerOutputs:
    """Run a model on a batch and keep what concerns its answer tokens.

    Args:
        model: A causal language model.
        batch: `input_ids`, `attention_mask` and `labels`, shape `(B, S)`.
        hidden_layer: Decoder layer whose output is kept, too.

    Returns:
        Logits (and hidden states) of the N answer tokens; with gradient where autograd is on.
    """
    labels = batch["labels"]
    positions = answer_positions(labels)
    targets, rows = answer_targets(labels)
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    kept = positions
    if _accepts_logits_to_keep(model):
        # Prompts are often longer than answers, and the vocabulary is the largest dimension of all: the LM head is
        # applied only where some row of the batch predicts an answer token.
        columns = positions.any(dim=0).nonzero().squeeze(1)
        inputs["logits_to_keep"], kept = columns, positions[:, columns]
    with ExitStack() as stack:
        outputs = [] if hidden_layer is None else stack.enter_context(layer_output(model, hidden_layer))
        logits = model(**inputs, use_cache=False).logits[kept]
    hidden = outputs[-1][positions] if outputs else None
    return AnswerOutputs(logits, targets, rows, labels.shape[0], hidden)


@contextmanager
def layer_output(model: nn.Module, layer_idx: int) -> Iterator[list[Tensor]]:
    """A list that receives the output of a decoder layer, shape `(B, S, H)`, at each forward pass.

    Raises:
        ValueError: The model has no such layer.
    """
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[:] = [output if isinstance(output, Tensor) else output[0]]

    handle = decoder_layer(model, layer_idx).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def decoder_layer(model: nn.Module, layer_idx: int) -> nn.Module:
    """The decoder layer with the given index.

    Raises:
        ValueError: The model has no such layer.
        UnsupportedModelError: The model has no routed experts.
    """
    block = find_moe_blocks(model)[0]
    parts = block.experts_name.split(".")
    stack = model.get_submodule(".".join(parts[: parts.index(str(block.layer_idx))]))
    num_layers = len(list(stack.children()))
    if not 0 <= layer_idx < num_layers:
        raise ValueError(
            f"{type(model).__name__} has {num_layers} decoder layers, got layer {layer_idx}; use 0 to {num_layers - 1}"
        )
    return stack.get_submodule(str(layer_idx))


def _accepts_logits_to_keep(model: nn.Module) -> bool:
    base = getattr(model, "module", model)  # what DistributedDataParallel wraps
    base = base.get_base_model() if isinstance(base, PeftModel) else base
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside the context no dropout and no gradient; afterwards the model trains again if it did before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
