"""One number for forgetting and retaining, to choose a checkpoint by."""

from __future__ import annotations

import math


def forget_retain_balance(forget_loss: float, retain_loss: float) -> float:
    """Harmonic mean of what is forgotten and of what is kept: high only where both are.

    `2 f r / (f + r)` with `f = 1 - exp(-forget_loss)` and `r = exp(-retain_loss)`: one minus the probability of a
    forget token, and that of a retain token (geometric means). It does not see answers in other words.

    Args:
        forget_loss: Mean cross-entropy of the forget set's answer tokens, in nats, >= 0.
        retain_loss: The same of the retain set.

    Returns:
        In [0, 1]; 0 where nothing is forgotten or nothing kept, and where a loss is not finite.
    """
    if not (math.isfinite(forget_loss) and math.isfinite(retain_loss)):
        return 0.0
    forgotten, kept = -math.expm1(-forget_loss), math.exp(-retain_loss)
    return 2 * forgotten * kept / (forgotten + kept) if forgotten + kept > 0 else 0.0
