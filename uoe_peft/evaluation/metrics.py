"""How well a model answers: pure functions of logits and of strings.

Both metrics are those of TOFU, https://arxiv.org/abs/2401.06121, Section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORE_INDEX = -100


def answer_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability that a model gives each answer, normalised for its length.

    `P(y | x)^(1 / |y|) = exp(-CE)`, CE the mean cross-entropy of the answer's tokens in nats. It does not see whether
    the model says something equivalent in other words.

    Args:
        logits: Next-token logits, shape `(B, S, V)`.
        labels: Token ids, -100 where a token is prompt or padding, shape `(B, S)`. `logits[:, s]` predict
            `labels[:, s + 1]`; the first label never counts.

    Returns:
        Shape `(B,)`, float32, in [0, 1].

    Raises:
        ValueError: The shapes differ, or a row has no answer token.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits must be (B, S, V) and labels (B, S), got {(*logits.shape,)} and {(*labels.shape,)}")
    targets = labels[:, 1:]
    counted = targets != IGNORE_INDEX
    num_answer_tokens = counted.sum(1)
    if not bool((num_answer_tokens > 0).all()):
        rows = (num_answer_tokens == 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} have no answer token; expected a label other than {IGNORE_INDEX} in each row")
    # Only the answers' logits are turned to float32: with a large vocabulary, all of them would take gigabytes.
    nll = cross_entropy(logits[:, :-1][counted].float(), targets[counted], reduction="none")
    row = counted.nonzero()[:, 0]
    answer_nll = torch.zeros(len(labels), device=nll.device).index_add(0, row, nll)
    return (-answer_nll / num_answer_tokens).exp()


def rouge_l_recall(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Share of each reference's words that the prediction repeats in the reference's order.

    `LCS(reference, prediction) / |reference|`, LCS the length of the longest common subsequence of stemmed words
    (https://aclanthology.org/W04-1013). It does not punish what a prediction says beyond the reference. Words are runs
    of ASCII letters and digits: other scripts count as nothing.

    Args:
        predictions: What the model said.
        references: What it should have said, in the same order.

    Returns:
        One value a pair, in [0, 1]; 0 for a reference without words.

    Raises:
        ValueError: The lengths differ.
        ImportError: The package `rouge-score` is missing.
    """
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} references")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs the package rouge-score: pip install 'uoe-peft[eval]'") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    return [float(scorer.score(reference, prediction)["rougeL"].recall) for prediction, reference in pairs]
