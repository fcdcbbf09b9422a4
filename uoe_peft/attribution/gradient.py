"""The WAGLE score of https://arxiv.org/abs/2410.17509, summed over the weights of each expert.

Letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from uoe_peft.attribution.ablation import answer_losses
from uoe_peft.attribution.expert_use import common_num_experts, progress_bar
from uoe_peft.attribution.sampling import SampleBatches
from uoe_peft.data.shares import Share
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.routing import select_blocks

Gradients = dict[nn.Parameter, Tensor]


def gradient_affinity(
    model: nn.Module,
    forget: SampleBatches,
    retain: SampleBatches | None,
    *,
    mu: float = 1.0,
    layer_indices: Sequence[int] | None = None,
    show_progress: bool = False,
) -> Tensor:
    """How much changing each expert's weights would move the forget loss and not the retain loss.

    `Σ |(θ - g_r / mu) ⊙ g_f|` over the expert's weights, g_f and g_r the gradients of the mean answer loss of the
    forget and the retain set; `Σ |θ ⊙ g_f|` without a retain set. Costs a forward and backward pass over both sets,
    and memory for two copies of the experts of the layers asked for. Processes that each have the whole model share the
    batches out.

    Args:
        model: A causal language model with routed experts.
        forget: The forget set.
        retain: The retain set, or None.
        mu: Curvature of the retain loss, > 0, the diagonal estimate that WAGLE takes as one number.
        layer_indices: Decoder layers to look at, L of them; None for all with routed experts.
        show_progress: Whether to show progress bars.

    Returns:
        Shape `(L, E)`, float32, >= 0.

    Raises:
        ValueError: `mu` is not positive; the model has no LM head; a gradient is NaN or infinite.
        RuntimeError: Another process has failed.
    """
    if not mu > 0:
        raise ValueError(f"mu must be > 0, got {mu}")
    blocks = select_blocks(model, layer_indices)
    num_experts = common_num_experts(blocks)
    parameters = [p for block in blocks for p in block.storage.module.parameters() if p.is_floating_point()]
    with evaluation_mode(model, gradients=True), _only_trainable(model, parameters):
        forget_gradients = _mean_gradients(model, forget, parameters, name="forget", show=show_progress)
        retain_gradients: Gradients = {}
        if retain is not None:
            retain_gradients = _mean_gradients(model, retain, parameters, name="retain", show=show_progress)
    affinity = torch.zeros(len(blocks), num_experts)
    for row, block in enumerate(blocks):
        own_parameters = list(block.storage.module.parameters())
        for expert_idx in range(num_experts):
            for projection in block.storage.projections:
                weight = block.storage.weight(projection, expert_idx).detach()
                owner = next(p for p in own_parameters if _is_view(weight, p))
                forget_gradient = _like_slice(forget_gradients[owner], owner, weight)
                direction = weight.float()
                if owner in retain_gradients:
                    direction = direction - _like_slice(retain_gradients[owner], owner, weight).float() / mu
                affinity[row, expert_idx] += float((direction * forget_gradient.float()).abs().sum())
    if not affinity.isfinite().all():
        raise ValueError("a gradient is NaN or infinite, expected finite ones; check the checkpoint and the dtype")
    return affinity


def _mean_gradients(
    model: nn.Module, batches: SampleBatches, parameters: Sequence[nn.Parameter], *, name: str, show: bool
) -> Gradients:
    """Gradients of the mean over sequences of the answer loss; the parameters' own `grad` is empty afterwards."""
    share = Share.of(model)
    own = batches.part(share)
    with share.failing_together(), progress_bar(own.num_tokens, f"Gradients on {name} set", show=show) as bar:
        for batch in own:
            (answer_losses(model, batch).sum() / len(batches.examples)).backward()
            bar.update(int(batch["attention_mask"].sum()))
    gradients = {p: share.total(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters}
    for parameter in parameters:
        parameter.grad = None
    return gradients


@contextmanager
def _only_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the context only the given parameters get gradients; afterwards all flags and gradients are as before."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, (requires_grad, gradient) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _is_view(weight: Tensor, parameter: Tensor) -> bool:
    """Whether a matrix lies inside a parameter's memory."""
    start = parameter.data_ptr()
    return start <= weight.data_ptr() < start + parameter.numel() * parameter.element_size()


def _like_slice(gradient: Tensor, owner: Tensor, weight: Tensor) -> Tensor:
    """The part of a parameter's gradient that belongs to a view of the parameter."""
    offset = weight.storage_offset() - owner.storage_offset()
    return gradient.contiguous().as_strided(weight.shape, weight.stride(), offset)
