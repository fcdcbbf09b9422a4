"""What a step may leave out: the layers above the one that a loss reads, and most of the logits at a time.

Each shortcut gives what the whole model gives, and is tried on the user's own model and first batch before it is taken.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from uoe_peft.data import Batch
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.exactness import stops_exactly
from uoe_peft.training.objective.forward import head_is_exact, vocab_size
from uoe_peft.training.objective.logits import LOGITS_AT_ONCE
from uoe_peft.training.objective.objective import Objective

logger = logging.getLogger(__name__)


def take_shortcuts(
    objective: Objective, batch: Batch, *, num_answer_tokens: int, whole_model: bool = False
) -> Objective:
    """The objective with the shortcuts that hold for its model; the log says which do not.

    Args:
        objective: As the settings ask for it.
        batch: Any batch, on the model's device.
        num_answer_tokens: The most that a batch may have.
        whole_model: Whether every layer must run: the weights are sharded, or the model is compiled.
    """
    if whole_model:
        return objective
    reference = replace(
        objective.reference,
        last_layer=_last_layer(objective, batch),
        logits_at_once=_logits_at_once(objective, batch, num_answer_tokens),
    )
    return replace(objective, reference=reference)


def _last_layer(objective: Objective, batch: Batch) -> int | None:
    """The layer at which a pass may end whose loss reads hidden states alone; None where it may not end."""
    reference = objective.reference
    if reference.hidden_layer is None:
        return None
    # The anchor reads the routing of every edited layer.
    last_layer = max([reference.hidden_layer, *objective.targets])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with evaluation_mode(reference.model):
        if stops_exactly(reference.model, inputs, last_layer):
            return last_layer
    logger.warning(
        "%s cannot end a pass at layer %d: losses that read its output run the whole model",
        type(reference.model).__name__,
        last_layer,
    )
    return None


def _logits_at_once(objective: Objective, batch: Batch, num_answer_tokens: int) -> int | None:
    model, args = objective.reference.model, objective.args
    if num_answer_tokens * vocab_size(model) <= LOGITS_AT_ONCE:
        return LOGITS_AT_ONCE
    if args.optim == "sophia" and args.sophia_estimator == "hutchinson":
        return None  # differentiates twice
    if head_is_exact(model, batch):
        return LOGITS_AT_ONCE
    logger.warning(
        "the LM head of %s cannot be applied in chunks: the logits of all answer tokens of a batch are in memory",
        type(model).__name__,
    )
    return None
