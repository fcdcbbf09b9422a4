"""Forget losses on whole answers: the forget answer as the one that is not preferred."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from uoe_peft.losses.answer_tokens import mean


def npo_loss(
    nll: Tensor,
    ref_nll: Tensor,
    *,
    beta: float = 0.1,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Negative Preference Optimization loss of a forget batch, averaged over examples.

    `-(2 / beta) * mean(log sigmoid(beta * (nll - ref_nll)))`, Eq. 3 of
    https://arxiv.org/abs/2404.05868. Whether an answer's nll is a sum or a mean over its tokens is
    the caller's choice; `beta` is not comparable between the two.

    Args:
        nll: Negative log-likelihood of each answer under the model, in nats. Shape `(B,)`.
        ref_nll: The same under the base model, without gradient. Shape `(B,)`.
        beta: Inverse temperature, > 0. As it tends to 0 the gradient tends to gradient ascent's.
        denominator: See `mean`.

    Returns:
        Scalar, positive.

    Raises:
        ValueError: `beta` is not positive, or the shapes differ.
    """
    _check_beta(beta)
    _check_shapes(nll=nll, ref_nll=ref_nll)
    return mean(-2 / beta * F.logsigmoid(beta * (nll - ref_nll.detach())), denominator)


def simnpo_loss(
    nll: Tensor,
    num_tokens: Tensor,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """NPO without a reference model: the answer's length-normalised likelihood is pushed down.

    `-(2 / beta) * mean(log sigmoid(beta * (nll / num_tokens - delta)))`,
    https://arxiv.org/abs/2410.07163.

    Args:
        nll: Negative log-likelihood of each answer, summed over its tokens, in nats. Shape `(B,)`.
        num_tokens: Number of its tokens. Shape `(B,)`.
        beta: Inverse temperature, > 0.
        delta: Margin, in nats per token.
        denominator: See `mean`.

    Returns:
        Scalar, positive.

    Raises:
        ValueError: `beta` is not positive, or the shapes differ.
    """
    _check_beta(beta)
    _check_shapes(nll=nll, num_tokens=num_tokens)
    per_token = nll / num_tokens.clamp(min=1)
    return mean(-2 / beta * F.logsigmoid(beta * (per_token - delta)), denominator)


def dpo_loss(
    forget_nll: Tensor,
    ref_forget_nll: Tensor,
    alternative_nll: Tensor,
    ref_alternative_nll: Tensor,
    *,
    beta: float = 0.1,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Direct Preference Optimization: an alternative answer is preferred to the forget answer.

    `-(2 / beta) * mean(log sigmoid(beta * ((nll_f - ref_f) - (nll_a - ref_a))))`: Eq. 7 of
    https://arxiv.org/abs/2305.18290, used for unlearning in https://arxiv.org/abs/2401.06121, times
    `2 / beta` as https://github.com/locuslab/open-unlearning has it. So its gradient has the size of
    `npo_loss`'s, which is what is left of it while the alternative's likelihood does not change, and
    learning rates of the two can be compared.

    Args:
        forget_nll: Negative log-likelihood of each forget answer, summed over its tokens, in nats.
            Shape `(B,)`.
        ref_forget_nll: The same under the base model. Shape `(B,)`.
        alternative_nll: Of the alternative answer to the same question. Shape `(B,)`.
        ref_alternative_nll: The same under the base model. Shape `(B,)`.
        beta: Inverse temperature, > 0.
        denominator: See `mean`.

    Returns:
        Scalar, positive; `2 log 2 / beta` while the model equals the base model.

    Raises:
        ValueError: `beta` is not positive, or the shapes differ.
    """
    _check_beta(beta)
    _check_shapes(
        forget_nll=forget_nll,
        ref_forget_nll=ref_forget_nll,
        alternative_nll=alternative_nll,
        ref_alternative_nll=ref_alternative_nll,
    )
    forgotten = forget_nll - ref_forget_nll.detach()
    adopted = ref_alternative_nll.detach() - alternative_nll
    return mean(-2 / beta * F.logsigmoid(beta * (forgotten + adopted)), denominator)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")


def _check_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected one value for each example, got the shapes {shapes}")
