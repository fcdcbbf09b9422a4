"""Metrics: pure functions of tensors, numbers and strings. Each says what it leaves out.

Routing is compared by the functions of `uoe_peft.moe.comparison`.
"""

from uoe_peft.evaluation.metrics.answers import (
    AnswerTokens,
    answer_probability,
    answer_tokens,
    exact_memorization,
    extraction_strength,
    probability_w_options,
    rouge_l_recall,
    truth_ratio,
)
from uoe_peft.evaluation.metrics.balance import forget_retain_balance
from uoe_peft.evaluation.metrics.fluency import distinct_n, perplexity, repetition, rr2r, says_something_else
from uoe_peft.evaluation.metrics.intervals import Interval, bootstrap_interval
from uoe_peft.evaluation.metrics.privacy import (
    membership_auc,
    mia_loss,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_zlib,
    privleak,
)
from uoe_peft.evaluation.metrics.strength import ScaleSearch, greatest_scale, least_scale
from uoe_peft.evaluation.metrics.tofu import forget_quality, model_utility, truth_ratio_score

__all__ = [
    "AnswerTokens",
    "Interval",
    "ScaleSearch",
    "answer_probability",
    "answer_tokens",
    "bootstrap_interval",
    "distinct_n",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "forget_retain_balance",
    "greatest_scale",
    "least_scale",
    "membership_auc",
    "mia_loss",
    "mia_min_k",
    "mia_min_k_plus_plus",
    "mia_zlib",
    "model_utility",
    "perplexity",
    "privleak",
    "probability_w_options",
    "repetition",
    "rouge_l_recall",
    "rr2r",
    "says_something_else",
    "truth_ratio",
    "truth_ratio_score",
]
