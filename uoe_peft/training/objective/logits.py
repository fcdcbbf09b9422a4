"""Logits of a batch's answer tokens that never stand in memory all at once.

What a loss reads of a token's logits is one number: its log-probability, its divergence from the base model. So these
numbers are computed a chunk of tokens at a time, and with each the gradient that it sends back into the hidden state;
the logits of a chunk are then dropped. The backward pass only scales what is there: nothing is computed twice.

Letters: N answer tokens, C tokens of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS_AT_ONCE = 2**25
"""Logits that may stand in memory at once: 128 MB in float32, 220 tokens of a vocabulary of 152,064."""

PerToken = Callable[[Tensor, slice], Tensor]
"""Logits of some of the tokens, `(C, V)`, and which they are -> a number for each, `(C,)`."""


@dataclass(frozen=True, eq=False)
class AnswerLogits:
    """With which each of N answer tokens is predicted.

    Attributes:
        states: The logits themselves, shape `(N, V)`; or, with a `head`, what it makes them of, shape `(N, H)`.
        head: Hidden states -> logits, without trainable weights; None where the logits are there.
        chunk_size: C; None for all at once.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None = None
    chunk_size: int | None = None

    def part(self, tokens: slice) -> Tensor:
        """Logits of some of the tokens. Shape `(C, V)`."""
        return self.states[tokens] if self.head is None else self.head(self.states[tokens])

    def per_token(self, function: PerToken) -> Tensor:
        """A number for each token, computed chunk by chunk; with gradient where autograd is on.

        Args:
            function: Computes them; without gradient, it may be any function of the logits. It must not mix tokens.

        Returns:
            Shape `(N,)`.
        """
        if self.head is None or self.chunk_size is None:
            return function(self.part(slice(None)), slice(None))
        if torch.is_grad_enabled() and self.states.requires_grad:
            found: Tensor = _PerToken.apply(self.states, self, function)
            return found
        return torch.cat([function(self.part(tokens), tokens) for tokens in self.chunks()])

    def chunks(self) -> Iterator[slice]:
        """Which tokens are together."""
        size = self.chunk_size or len(self.states)
        for start in range(0, len(self.states), size):
            yield slice(start, start + size)


class _PerToken(torch.autograd.Function):
    """Numbers by token, and, computed with them, their slopes in the token's own hidden state."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, logits: AnswerLogits, function: PerToken) -> Tensor:
        values, slopes = [], torch.empty_like(states)
        for tokens in logits.chunks():
            with torch.enable_grad():
                hidden = states[tokens].detach().requires_grad_(True)
                assert logits.head is not None
                value = function(logits.head(hidden), tokens)
                # A token's number depends on its own hidden state alone: the sum's gradient holds every slope.
                (slopes[tokens],) = torch.autograd.grad(value.sum(), hidden)
            values.append(value.detach())
        ctx.save_for_backward(slopes)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradient[:, None] * slopes).to(slopes.dtype), None, None
