"""The settings of a run and its model -> the objective."""

from __future__ import annotations

import logging

import torch
from torch import nn

from uoe_peft.losses import control_direction
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.segments import find_layers
from uoe_peft.training.choices import HIDDEN_RETAIN_LOSSES
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.objective.anchor import Targets, find_targets
from uoe_peft.training.objective.forward import decoder_layer
from uoe_peft.training.objective.objective import Objective
from uoe_peft.training.objective.reference import Reference
from uoe_peft.training.reuse.edited import edited_layers, trained_beside

logger = logging.getLogger(__name__)


def build_objective(model: nn.Module, args: UnlearningConfig, *, device: torch.device) -> Objective:
    """The losses that the settings name, for a model.

    Args:
        model: The trained model.
        args: The settings.
        device: Where batches are.

    Raises:
        ValueError: "rmu" or a retain loss on hidden states without a layer to read, or with one that does not exist or
            does not depend on what is trained.
    """
    targets = find_targets(model)
    anchored = _has_routing(model, targets)
    if targets and not anchored:
        logger.info("every token uses all experts of the layers %s: the router anchor does not apply", [*targets])
    if args.forget_loss != "rmu" and args.retain_loss not in HIDDEN_RETAIN_LOSSES:
        return Objective(args, Reference(model, kind=args.reference), targets, anchored=anchored)
    layer_idx = args.rmu_layer if args.rmu_layer is not None else max(targets, default=None)
    if layer_idx is None:
        raise ValueError(
            "rmu, embed_diff and relative_embed_diff read the output of one decoder layer: set rmu_layer (an adapter "
            "of another method than UOE, or none, does not name a layer)"
        )
    layers = find_layers(model)
    num_layers = len(list(layers.children()))
    if -num_layers <= layer_idx < 0:
        layer_idx += num_layers
    decoder_layer(model, layer_idx)  # an index out of range is said now, not at the first step
    edited = edited_layers(layers)
    if not trained_beside(model, layers) and layer_idx < min(edited):
        raise ValueError(
            f"rmu_layer={layer_idx} is below every layer that is trained, {edited}: its output does not depend on "
            "what is trained; choose one of these layers, or one above"
        )
    hidden_size = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
    direction = control_direction(hidden_size, seed=args.rmu_seed).to(device)
    return Objective(args, Reference(model, layer_idx, args.reference), targets, direction, anchored)


def _has_routing(model: nn.Module, targets: Targets) -> bool:
    """Whether tokens choose among the experts of the target layers."""
    return any(block.gate_name for block in find_moe_blocks(model) if block.layer_idx in targets) if targets else False
