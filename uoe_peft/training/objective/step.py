"""What a step is given to divide by, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from uoe_peft.data import Batch
from uoe_peft.losses import answer_positions
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.objective.forward import AnswerOutputs


@dataclass(frozen=True)
class Denominators:
    """What sums over a batch are divided by: the counts of the whole batch that one optimiser step sees.

    When a step is split over several micro-batches or processes, these are the whole step's counts divided by
    the number of parts; the average over the parts is then exactly the loss of the whole. None: the part's own.
    """

    tokens: Tensor | None = None
    """Answer tokens."""
    examples: Tensor | None = None
    context: Tensor | None = None
    """All tokens but padding."""


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of an optimiser step.

    Attributes:
        counts: What the losses divide by, by role.
        first: The first micro-batch.
    """

    counts: Mapping[str, Denominators] = field(default_factory=dict)
    first: Mapping[str, Batch] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one pair of batches gave.

    Attributes:
        terms: "forget", and where they apply "alternative", "retain" and "anchor": losses before weighting, with
            gradient. Scalars.
        metrics: What else is logged. Scalars without gradient.
        outputs: The model's outputs on the forget batch.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]
    outputs: AnswerOutputs

    def loss(self, args: UnlearningConfig) -> Tensor:
        """The weighted sum of the terms. Scalar."""
        weights = {
            "forget": args.forget_weight,
            "alternative": args.alternative_weight,
            "retain": args.retain_weight,
            "anchor": args.anchor_weight,
        }
        return torch.stack([weights[name] * term for name, term in self.terms.items()]).sum()


def count(batch: Batch) -> Tensor:
    """What `Denominators` count: answer tokens, examples, all tokens but padding. int64 of shape `(3,)`."""
    examples = torch.ones_like(batch["index"]).sum()
    return torch.stack([answer_positions(batch["labels"]).sum(), examples, batch["attention_mask"].sum()])
