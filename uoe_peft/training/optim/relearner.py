"""Somebody who trains the answers back while they are being forgotten: a model's weights, and how far they moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Relearner:
    """Offsets of all weights that training leaves alone, or of all weights where it leaves none.

    TAR, https://arxiv.org/abs/2408.00761, attacks a copy for several steps before each of its own, and takes the
    gradient there as that of the weights it attacked (first order). Here one attack goes along with training, one step
    to each of training's, and begins anew after some: it meets the model as it is now at no further cost.

    An adapter's delta is added to its slice, so that moving the slice moves the edited one as far.
    """

    def __init__(self, model: nn.Module, *, learning_rate: float, num_steps: int) -> None:
        """Begin at the model's own weights.

        Args:
            model: The trained model.
            learning_rate: Of AdamW, constant.
            num_steps: After so many steps the offsets are 0 again.
        """
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.weights = [parameter for parameter in model.parameters() if not parameter.requires_grad] or self.trained
        self._learning_rate, self._num_steps = learning_rate, num_steps
        self._begin()

    def _begin(self) -> None:
        self.offsets = [torch.zeros_like(weight, requires_grad=True) for weight in self.weights]
        self._optimizer = torch.optim.AdamW(self.offsets, lr=self._learning_rate, weight_decay=0.0)
        self._taken = 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the weights are moved and have gradients; afterwards they are what they were, to the bit.

        A graph that is built inside must be used inside.
        """
        before = [(weight, weight.detach().clone(), weight.requires_grad) for weight in self.weights]
        for weight, offset in zip(self.weights, self.offsets, strict=True):
            weight.requires_grad_(True).data.add_(offset.detach())
        try:
            yield
        finally:
            for weight, own, was_trained in before:
                weight.data.copy_(own)
                weight.requires_grad_(was_trained)

    def learn(self, nll: Tensor, *, gradients_of: Tensor) -> None:
        """Differentiate two losses of one pass: the relearner's, kept for its next step, and the training's.

        Args:
            nll: What the relearner lowers: negative log-likelihood of the answers to be forgotten. Scalar.
            gradients_of: The loss whose gradient is added to that of the trained parameters. Scalar.

        Raises:
            FloatingPointError: Either is not finite.
        """
        for name, loss in (("likelihood of the forget answers", nll), ("loss", gradients_of)):
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"after {self._taken} steps of a simulated relearning the {name} is {loss.item()}: lower "
                    f"relearner_rate={self._learning_rate:g}, or learning_rate if it was lost before"
                )
        for parameter, gradient in zip(self.trained, _gradients(gradients_of, self.trained), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for offset, gradient in zip(self.offsets, _gradients(nll, self.weights), strict=True):
            offset.grad = gradient if offset.grad is None else offset.grad + gradient

    def step(self) -> None:
        """Move by the gradients since the last step, or begin anew if that was the last one."""
        self._taken += 1
        if self._taken >= self._num_steps:
            self._begin()
            return
        self._optimizer.step()
        self._optimizer.zero_grad()


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
