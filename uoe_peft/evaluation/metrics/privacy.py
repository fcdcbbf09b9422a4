"""Can one tell that a model was trained on a text? Membership scores, and how well they tell.

Names as in open-unlearning. Every score is higher for a text that was learned; each is a function of one text's tokens.
They tell members from non-members only where both are of one kind: texts of other style or age differ anyhow.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def mia_loss(log_probs: Tensor) -> float:
    """Mean log-probability of a text's tokens, in nats (https://arxiv.org/abs/1709.01604).

    Args:
        log_probs: Of each token. Shape `(T,)`, T >= 1.
    """
    return float(log_probs.mean())


def mia_zlib(log_probs: Tensor, text: str) -> float:
    """Log-probability of a text over the bytes that zlib needs for it (https://arxiv.org/abs/2012.07805).

    What is easily compressed is likely under any model: the division takes that out.

    Args:
        log_probs: Of each token, in nats. Shape `(T,)`, T >= 1.
        text: The text that the tokens spell.
    """
    return float(log_probs.sum()) / len(zlib.compress(text.encode()))


def mia_min_k(log_probs: Tensor, *, k: float = 0.2) -> float:
    """Mean log-probability of the least likely tokens, in nats: Min-K% Prob (https://arxiv.org/abs/2310.16789).

    Args:
        log_probs: Of each token. Shape `(T,)`, T >= 1.
        k: Share of the tokens, in (0, 1]; at least one token is taken.

    Raises:
        ValueError: `k` is out of range.
    """
    return _mean_of_lowest(log_probs, k)


def mia_min_k_plus_plus(standardised: Tensor, *, k: float = 0.2) -> float:
    """Mean standardised log-probability of the lowest tokens: Min-K%++ (https://arxiv.org/abs/2404.02936).

    Args:
        standardised: As in `AnswerTokens`. Shape `(T,)`, T >= 1.
        k: Share of the tokens, in (0, 1]; at least one token is taken.

    Raises:
        ValueError: `k` is out of range.
    """
    return _mean_of_lowest(standardised, k)


def membership_auc(members: Sequence[float], nonmembers: Sequence[float]) -> float:
    """Chance that a member has a higher score than a non-member: area under the ROC curve, by scikit-learn.

    Args:
        members: Scores of texts that were trained on (here: of the forget set).
        nonmembers: Scores of texts of the same kind that never were.

    Returns:
        In [0, 1]: 0.5 where the score cannot tell, 1 where it always can.

    Raises:
        ValueError: One of both is empty.
        ImportError: The package `scikit-learn` is missing.
    """
    if not len(members) or not len(nonmembers):
        raise ValueError(f"an AUC needs members and non-members, got {len(members)} and {len(nonmembers)}")
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("an AUC needs the package scikit-learn: pip install 'uoe-peft[eval]'") from error
    is_member = np.r_[np.ones(len(members)), np.zeros(len(nonmembers))]
    return float(roc_auc_score(is_member, np.r_[np.asarray(members), np.asarray(nonmembers)]))


def privleak(auc: float, reference_auc: float = 0.5) -> float:
    """How far a model's membership AUC is from a reference's, in percent: MUSE (https://arxiv.org/abs/2407.06460).

    `100 · ((1 - auc) - (1 - reference_auc)) / (1 - reference_auc)`, AUC of forget set against holdout by Min-K%.
    Below 0: under-unlearned, still told as members (-100 at an AUC of 1); above: over-unlearned, told by the traces.

    Args:
        auc: Of the unlearned model, in [0, 1].
        reference_auc: Of a model that never saw the forget set, in [0, 1); 0.5 where there is none.

    Raises:
        ValueError: One of both is out of range.
    """
    if not (0 <= auc <= 1 and 0 <= reference_auc < 1):
        raise ValueError(f"auc must be in [0, 1] and reference_auc in [0, 1), got {auc} and {reference_auc}")
    return 100 * (reference_auc - auc) / (1 - reference_auc)


def _mean_of_lowest(values: Tensor, k: float) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"k must be in (0, 1], got {k}")
    return float(values.sort().values[: max(1, int(len(values) * k))].mean())
