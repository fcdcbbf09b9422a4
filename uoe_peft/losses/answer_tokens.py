"""Logits and labels of a batch -> its answer tokens, and what sums over them.

Every loss of this package takes answer tokens as a flat list of N: prompt and padding (label -100)
are dropped here, once, so that no loss can count them or use -100 as an index.

Letters: B batch, S sequence, V vocabulary, N answer tokens of the batch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not part of an answer: prompt, padding. It never counts."""

SequenceReduction = Literal["sum", "mean"]
TokenReduction = Literal["mean", "none"]


def answer_positions(labels: Tensor) -> Tensor:
    """Positions from which an answer token is predicted: those before it.

    Args:
        labels: Token ids, -100 where a token is not part of an answer. Shape `(B, S)`.

    Returns:
        Bool, True where the *next* token is an answer token; never at the last position.
        Shape `(B, S)`.
    """
    answers = labels != IGNORE_INDEX
    return torch.cat([answers[:, 1:], torch.zeros_like(answers[:, :1])], dim=1)


def answer_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The answer tokens of a batch, and the example that each belongs to.

    Args:
        labels: Token ids, -100 where a token is not part of an answer. Shape `(B, S)`.

    Returns:
        Token ids and row numbers, int64 of shape `(N,)`, in the order of `hidden[answer_positions]`.
        A sequence's first token has nothing before it to be predicted from and is no answer token.
    """
    rows, places = answer_positions(labels).nonzero(as_tuple=True)
    return labels[rows, places + 1], rows


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each token, in nats, in at least float32.

    Args:
        logits: Shape `(N, V)`.
        targets: Token ids, 0 to V - 1. Shape `(N,)`.

    Returns:
        Not positive. Shape `(N,)`.
    """
    # Half precision is not enough for a sum over a large vocabulary; float64 stays as it is.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(wide, targets, reduction="none")


def sequence_nll(
    log_probs: Tensor,
    rows: Tensor,
    *,
    num_examples: int,
    reduction: SequenceReduction = "sum",
) -> Tensor:
    """Negative log-likelihood of each answer, in nats.

    Args:
        log_probs: Of the answer tokens. Shape `(N,)`.
        rows: The example that each token belongs to, 0 to B - 1. Shape `(N,)`.
        num_examples: B.
        reduction: "sum" over an answer's tokens, or their "mean".

    Returns:
        Shape `(B,)`; 0 for an example without answer tokens.

    Raises:
        ValueError: Unknown `reduction`.
    """
    total = -log_probs.new_zeros(num_examples).index_add(0, rows, log_probs)
    match reduction:
        case "sum":
            return total
        case "mean":
            return total / answer_lengths(rows, num_examples=num_examples).clamp(min=1)
        case _:
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")


def answer_lengths(rows: Tensor, *, num_examples: int) -> Tensor:
    """Number of answer tokens of each example.

    Args:
        rows: The example that each token belongs to. Shape `(N,)`.
        num_examples: B.

    Returns:
        int64 of shape `(B,)`.
    """
    return torch.bincount(rows, minlength=num_examples)


def mean(values: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """The sum of a batch's values over the number of values, or over `denominator`.

    A batch that is trained in several parts (gradient accumulation, several processes) passes the
    whole batch's number: the parts then add up to exactly the loss of the whole.

    Args:
        values: Any shape.
        denominator: What the sum is divided by; None for the number of values.

    Returns:
        Scalar.

    Raises:
        ValueError: There are no values and no denominator: their mean is undefined.
    """
    if denominator is not None:
        return values.sum() / denominator
    if values.numel() == 0:
        raise ValueError("a loss got no values: the batch has no answer tokens")
    return values.mean()


def reduce_tokens(values: Tensor, reduction: TokenReduction, denominator: Tensor | float | None) -> Tensor:
    """Values of answer tokens as they are, shape `(N,)`, or their mean, a scalar.

    Args:
        values: Shape `(N,)`.
        reduction: "none" or "mean".
        denominator: Of "mean", see `mean`.

    Raises:
        ValueError: Unknown `reduction`.
    """
    match reduction:
        case "none":
            return values
        case "mean":
            return mean(values, denominator)
        case _:
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
