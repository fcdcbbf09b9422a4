"""TOFU's two numbers, https://arxiv.org/abs/2401.06121: what was forgotten, and what is still of use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

TruthRatioMean = Literal["closer_to_1_better", "true_better"]


def forget_quality(unlearned: Sequence[float], retrained: Sequence[float]) -> float:
    """How well unlearning is hidden: p-value that both models' truth ratios on the forget set are of one kind.

    The two-sample Kolmogorov-Smirnov test (scipy). Near 1: nobody can tell the unlearned model from one that never saw
    the set. It says nothing of models that differ in anything but these ratios, and shrinks with the number of rows:
    compare p-values of equally many rows only.

    Args:
        unlearned: Truth ratio of each row, of the unlearned model.
        retrained: The same of the model that was trained without the forget set.

    Returns:
        In [0, 1].

    Raises:
        ValueError: There are no ratios, or one is not a number.
        ImportError: The package `scipy` is missing.
    """
    for name, ratios in {"unlearned": unlearned, "retrained": retrained}.items():
        if not len(ratios) or bool(np.isnan(np.asarray(ratios, dtype=float)).any()):
            raise ValueError(f"{name} must hold at least one truth ratio and no NaN, got {len(ratios)} values")
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise ImportError("forget quality needs the package scipy: pip install 'uoe-peft[eval]'") from error
    return float(ks_2samp(unlearned, retrained).pvalue)


def truth_ratio_score(ratio: float, better: TruthRatioMean) -> float:
    """A truth ratio as a score in [0, 1], which means can be taken of; open-unlearning's aggregators of these names.

    Args:
        ratio: Truth ratio, >= 0.
        better: "closer_to_1_better" for what should be forgotten: `min(R, 1 / R)`; "true_better" for all else:
            `max(0, 1 - R)`.

    Returns:
        In [0, 1].

    Raises:
        ValueError: The ratio is negative or no number, or `better` is unknown.
    """
    if not ratio >= 0:
        raise ValueError(f"a truth ratio is at least 0, got {ratio}")
    match better:
        case "closer_to_1_better":
            return min(ratio, 1 / ratio) if ratio > 0 else 0.0
        case "true_better":
            return max(0.0, 1 - ratio)
        case _:
            raise ValueError(f'better must be "closer_to_1_better" or "true_better", got {better!r}')


def model_utility(scores: Iterable[float]) -> float:
    """Harmonic mean of scores: high only where all are; open-unlearning's `hm_aggregate`.

    TOFU's are probability, ROUGE-L recall and truth ratio of three sets: retain, real authors, world facts.

    Args:
        scores: Each in [0, 1].

    Returns:
        In [0, 1]; 0 where one is 0.

    Raises:
        ValueError: There are none, or one is outside [0, 1].
    """
    values = np.asarray(list(scores), dtype=float)
    if not len(values) or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"model utility is of scores in [0, 1], at least one, got {values.tolist()}")
    return float(len(values) / (1 / values).sum()) if values.all() else 0.0
