"""How far a model prefers other answers to the forget answers, as TRL's `DPOTrainer` logs it.

Letters: B examples.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reward_metrics(rejected: Tensor, chosen: Tensor | None = None) -> dict[str, Tensor]:
    """Means over a batch, under TRL's names.

    A reward is `beta * (log p(answer) - log p_ref(answer))`.

    Args:
        rejected: Rewards of the forget answers. Shape `(B,)`.
        chosen: Rewards of the answers that are preferred to them. None where a loss has none ("npo"): the forget answer
            is then compared with itself under the reference, whose reward is 0. Shape `(B,)`.

    Returns:
        "rewards/rejected"; "rewards/chosen" where there are any; "rewards/margins", chosen minus rejected; and
        "rewards/accuracies", the share of the examples with a margin above 0. Scalars without gradient.
    """
    rejected = rejected.detach()
    margins = (torch.zeros_like(rejected) if chosen is None else chosen.detach()) - rejected
    found = {"rejected": rejected, "margins": margins, "accuracies": (margins > 0).float()}
    if chosen is not None:
        found["chosen"] = chosen.detach()
    return {f"rewards/{name}": values.mean() for name, values in found.items()}
