"""The experts that an adapter edits: which they are, how often tokens reach them, the anchor of the router to them.

Letters: T tokens of a batch, padding included, N answer tokens, K experts per token, M target experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft import losses
from uoe_peft.moe.routing import LayerRouting
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.tuner import UOEConfig

Targets = dict[int, list[int]]
"""Target experts by decoder layer."""


def find_targets(model: nn.Module) -> Targets:
    """Target experts of the UOE adapters that are trained; empty where there is none.

    Adapters that are active but frozen are earlier requests: their experts are no concern of this one's anchor.
    """
    targets: defaultdict[int, set[int]] = defaultdict(set)
    for config in trained_configs(model):
        for layer_idx, expert_idx in config.target_experts:
            targets[layer_idx].add(expert_idx)
    return {layer_idx: sorted(targets[layer_idx]) for layer_idx in sorted(targets)}


def active_configs(model: nn.Module) -> list[UOEConfig]:
    """Configs of the model's active UOE adapters."""
    if not isinstance(model, PeftModel):
        return []
    configs = [model.peft_config[name] for name in model.active_adapters]
    return [config for config in configs if isinstance(config, UOEConfig)]


def trained_configs(model: nn.Module) -> list[UOEConfig]:
    """Configs of the model's active UOE adapters that have trainable parameters."""
    if not isinstance(model, PeftModel):
        return []
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    configs = {name: model.peft_config[name] for name in model.active_adapters}
    return [
        config
        for name, config in configs.items()
        if isinstance(config, UOEConfig) and any(".uoe_" in path and f".{name}." in path for path in trainable)
    ]


def anchor_term(
    routing: Mapping[int, LayerRouting],
    targets: Targets,
    mask: Tensor,
    *,
    args: UnlearningConfig,
    denominator: Tensor | None = None,
) -> Tensor:
    """Router anchor of a forget batch, Eq. 3 of https://arxiv.org/abs/2411.18797, mean over target layers.

    Args:
        routing: Of the forget batch.
        targets: Target experts by layer.
        mask: 1 for tokens, 0 for padding. Shape `(B, S)`.
        args: `anchor_scores` and `anchor_reduction`.
        denominator: Number of tokens to divide by; None for those of the batch.

    Returns:
        Scalar, before weighting.
    """
    terms = []
    for layer_idx, experts in targets.items():
        layer = routing[layer_idx]
        scores = layer.scores
        if args.anchor_scores == "topk":
            scores = losses.mask_to_top_k(scores, layer.top_k_index)
        counted = mask.flatten().bool()
        terms.append(
            losses.anchor_loss(scores, experts, counted, reduction=args.anchor_reduction, denominator=denominator)
        )
    return torch.stack(terms).mean()


def target_rates(routing: Mapping[int, LayerRouting], targets: Targets, mask: Tensor) -> Tensor:
    """Share of tokens that select each target expert: its activation rate. In [0, 1], shape `(M,)`.

    Args:
        routing: Of a batch.
        targets: Target experts by layer.
        mask: Tokens that count. Shape `(B, S)`.
    """
    return selects_target(routing, targets, mask).float().mean(dim=0)


def selects_target(routing: Mapping[int, LayerRouting], targets: Targets, mask: Tensor) -> Tensor:
    """Whether each token that counts selects each target expert. Bool of shape `(tokens that count, M)`."""
    counted = mask.flatten().bool()
    columns = [
        (routing[layer_idx].top_k_index[counted] == expert).any(dim=-1)
        for layer_idx, experts in targets.items()
        for expert in experts
    ]
    return torch.stack(columns, dim=-1)
