"""Estimates of the diagonal of a loss's curvature, for Sophia.

Letters: N sampled answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from uoe_peft import losses
from uoe_peft.data import Batch
from uoe_peft.moe.routing import RoutingTrace
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.objective.objective import Objective

Estimates = dict[nn.Parameter, Tensor]


def estimate_curvature(objective: Objective, batches: Mapping[str, Batch], trace: RoutingTrace | None) -> Estimates:
    """The estimate that `sophia_estimator` names, of all trainable weights, on a pair of batches.

    Args:
        objective: The losses, and the model.
        batches: By role.
        trace: Routing of the target layers in the model's latest pass; None for models without targets.

    Returns:
        By parameter, of its shape, in float32.

    Raises:
        ValueError: `sophia_estimator` is "squared_gradient", which Sophia takes from the gradient by itself.
    """
    model, args = objective.reference.model, objective.args
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    match args.sophia_estimator:
        case "gauss_newton_bartlett":
            asked = [batches[role] for role in ("forget", "retain") if role in batches]
            return gauss_newton_bartlett(model, asked, parameters)
        case "hutchinson":
            return hutchinson(lambda: objective.step(model, batches, trace, {}).loss(args), parameters)
        case "squared_gradient":
            raise ValueError("sophia_estimator='squared_gradient' needs no estimate beside the gradient")


def gauss_newton_bartlett(model: nn.Module, batches: Iterable[Batch], parameters: Sequence[nn.Parameter]) -> Estimates:
    """Diagonal of the Gauss-Newton matrix of the answers' cross-entropy, estimated without bias; never negative.

    `N · ĝ ⊙ ĝ`, ĝ the gradient of the mean cross-entropy of N answer tokens that are sampled from the model itself:
    Algorithm 2 of https://arxiv.org/abs/2305.14342. It sees what the model says of the batches, not the loss that is
    minimised on them.

    Args:
        model: A causal language model.
        batches: Where answers are sampled: at each answer token, given the batch's own tokens before it.
        parameters: Which weights.

    Returns:
        By parameter, of its shape.
    """
    terms = []
    for batch in batches:
        logits = forward_answers(model, batch).logits
        sampled = torch.multinomial(logits.detach().float().softmax(dim=-1), 1).squeeze(-1)
        terms.append(losses.token_log_probs(logits, sampled))
    log_probs = torch.cat(terms)
    gradients = torch.autograd.grad(-log_probs.mean(), list(parameters), allow_unused=True)
    scale = len(log_probs)
    return {p: scale * _or_zero(gradient, p).square() for p, gradient in zip(parameters, gradients, strict=True)}


def hutchinson(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> Estimates:
    """Diagonal of the Hessian of a loss, estimated without bias; of either sign.

    `u ⊙ (H u)`, u random signs: Algorithm 1 of https://arxiv.org/abs/2305.14342. Differentiates twice, which fused
    attention kernels cannot; within the loss, attention that goes through PyTorch uses the plain one.

    Args:
        loss: Computes the loss, with gradient.
        parameters: Which weights.

    Returns:
        By parameter, of its shape.

    Raises:
        RuntimeError: The model uses an operation that cannot be differentiated twice.
    """
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss(), list(parameters), create_graph=True, allow_unused=True)
        reached = [(p, gradient) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
        signs = [torch.randint_like(gradient, 2) * 2 - 1 for _, gradient in reached]
        products = [(gradient * sign).sum() for (_, gradient), sign in zip(reached, signs, strict=True)]
        curved = [product for product in products if product.requires_grad]  # not those of a linear dependence
        try:
            curvatures = torch.autograd.grad(curved, [p for p, _ in reached], allow_unused=True)
        except RuntimeError as error:
            raise RuntimeError(
                "the Hutchinson estimate differentiates twice, and the model has an operation that cannot be; load it "
                'with attn_implementation="eager", or use sophia_estimator="gauss_newton_bartlett"'
            ) from error
    found = {
        p: sign.float() * _or_zero(curvature, p)
        for (p, _), sign, curvature in zip(reached, signs, curvatures, strict=True)
    }
    return {p: found.get(p, torch.zeros_like(p, dtype=torch.float32)) for p in parameters}


def _or_zero(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    """In float32; zero where the loss does not depend on a parameter: each process then has all of them to average."""
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.detach().float()
