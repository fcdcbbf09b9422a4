"""How well a model answers: pure functions of logits, of an answer's tokens, and of strings.

Probability and ROUGE-L are those of TOFU, https://arxiv.org/abs/2401.06121, Section 2.2. What a metric needs of the
logits is reduced to a few numbers a token first (`answer_tokens`), so that one forward pass serves all of them.

Letters: B batch, S sequence, V vocabulary, T tokens of one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from uoe_peft.losses import IGNORE_INDEX

_MAX_VALUES = 2**25  # of float32: 128 MB


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """What a model thinks of the tokens of one answer, each predicted from all that stands before it.

    Attributes:
        log_probs: Log-probability of each token, in nats, not positive. Shape `(T,)`, float32.
        is_argmax: Whether each token is the model's most likely one. Shape `(T,)`, bool.
        standardised: Log-probability of each token minus the mean log-probability of a token drawn from the model, in
            standard deviations of that draw: the token score of Min-K%++. Shape `(T,)`, float32.
    """

    log_probs: Tensor
    is_argmax: Tensor
    standardised: Tensor


def answer_tokens(logits: Tensor, labels: Tensor) -> list[AnswerTokens]:
    """What a model thinks of the tokens of each answer of a batch.

    Args:
        logits: Next-token logits, shape `(B, S, V)`.
        labels: Token ids, -100 where a token is prompt or padding, shape `(B, S)`. `logits[:, s]` predict
            `labels[:, s + 1]`; the first label never counts.

    Returns:
        One value a row, on the logits' device.

    Raises:
        ValueError: The shapes differ, a row has no answer token, or logits of an answer token are not finite.
    """
    counted, lengths = _counted(logits, labels)
    chosen, targets = logits[:, :-1][counted], labels[:, 1:][counted]
    # Some numbers of every token and word are needed at once: with a large vocabulary, a few hundred tokens at a time.
    num_tokens = max(1, _MAX_VALUES // logits.shape[-1])
    pieces = zip(chosen.split(num_tokens), targets.split(num_tokens), strict=True)
    parts = [torch.cat(part) for part in zip(*(_token_statistics(*piece) for piece in pieces), strict=True)]
    broken = ~torch.isfinite(parts[0] + parts[2])
    if bool(broken.any()):
        rows = counted.nonzero()[:, 0][broken].unique().tolist()
        raise ValueError(
            f"the logits of rows {rows} are not finite: the model is broken, overflows in its dtype, or rules a token "
            "of the answer out"
        )
    split = (part.split(lengths.tolist()) for part in parts)
    return [AnswerTokens(*tokens) for tokens in zip(*split, strict=True)]


def _token_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of `AnswerTokens` of N tokens. Args: shapes `(N, V)` and `(N,)`. Returns: shape `(N,)` each."""
    log_probs = logits.float().log_softmax(-1)
    probs = log_probs.exp()
    possible = log_probs.masked_fill(probs == 0, 0)  # 0 · log 0 counts as 0
    mean = (probs * possible).sum(-1)
    variance = (probs * (possible - mean[:, None]).square()).sum(-1)
    of_target = log_probs.gather(1, targets[:, None])[:, 0]
    return of_target, logits.argmax(-1) == targets, (of_target - mean) / variance.clamp(min=1e-6).sqrt()


def answer_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability that a model gives each answer, normalised for its length; open-unlearning's `probability`.

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
    counted, lengths = _counted(logits, labels)
    nll = cross_entropy(logits[:, :-1][counted].float(), labels[:, 1:][counted], reduction="none")
    row = counted.nonzero()[:, 0]
    answer_nll = torch.zeros(len(labels), device=nll.device).index_add(0, row, nll)
    return (-answer_nll / lengths).exp()


def exact_memorization(is_argmax: Tensor) -> float:
    """Share of an answer's tokens that are the model's most likely ones, each given the true tokens before it.

    https://arxiv.org/abs/2304.11158 and open-unlearning's metric of this name. A model that has lost one word of a
    long answer still has nearly all of it; what it says by itself goes unseen.

    Args:
        is_argmax: As in `AnswerTokens`. Shape `(T,)`.

    Returns:
        In [0, 1].

    Raises:
        ValueError: There are no tokens.
    """
    return float(_not_empty(is_argmax).float().mean())


def extraction_strength(is_argmax: Tensor) -> float:
    """Share of an answer that need not be told to a model for it to say the rest word for word.

    `1 - k / T`, k the least number of true tokens after which all others are the model's most likely ones
    (https://arxiv.org/abs/2012.07805). All T tokens told and none said gives 0: nothing was extracted.
    (open-unlearning's metric of this name gives `1 / T` there.)

    Args:
        is_argmax: As in `AnswerTokens`. Shape `(T,)`.

    Returns:
        In [0, 1]: 0 where the last token is not said, 1 where the whole answer is.

    Raises:
        ValueError: There are no tokens.
    """
    misses = (~_not_empty(is_argmax).bool()).nonzero()
    needed = int(misses[-1]) + 1 if len(misses) else 0
    return 1 - needed / len(is_argmax)


def truth_ratio(true_nll: float, false_nll: Sequence[float]) -> float:
    """How likely false answers are against the true one in other words: `P(false) / P(true)`, TOFU's Eq. 1.

    The probabilities are normalised for length; those of the false answers are averaged geometrically, as TOFU's code
    and open-unlearning's do (the paper's equation has the arithmetic mean). 0: sure of the truth; 1: cannot tell.

    Args:
        true_nll: Mean negative log-likelihood of a token of the paraphrased true answer, in nats.
        false_nll: The same of each false answer.

    Returns:
        At least 0; not above `exp(700)`, so that it stays finite.

    Raises:
        ValueError: There is no false answer.
    """
    if not len(false_nll):
        raise ValueError("a truth ratio needs at least one false answer")
    mean_false = torch.tensor(list(false_nll), dtype=torch.float64).mean()
    return float((true_nll - mean_false).clamp(max=700).exp())


def probability_w_options(true_nll: float, false_nll: Sequence[float]) -> float:
    """Probability of the true answer among the given ones, each normalised for length.

    `P(true) / (P(true) + sum P(false))`: TOFU's probability on real authors and world facts, whose wording the model
    was never taught.

    Args:
        true_nll: Mean negative log-likelihood of a token of the true answer, in nats.
        false_nll: The same of each false answer.

    Returns:
        In [0, 1].

    Raises:
        ValueError: There is no false answer.
    """
    if not len(false_nll):
        raise ValueError("a probability among options needs at least one false answer")
    return float(torch.tensor([-true_nll, *(-nll for nll in false_nll)], dtype=torch.float64).softmax(0)[0])


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


def _counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the tokens 1 to S - 1 are answers, shape `(B, S - 1)`; and their number a row, shape `(B,)`."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits must be (B, S, V) and labels (B, S), got {(*logits.shape,)} and {(*labels.shape,)}")
    counted = labels[:, 1:] != IGNORE_INDEX
    lengths = counted.sum(1)
    if not bool((lengths > 0).all()):
        rows = (lengths == 0).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} have no answer token; expected a label other than {IGNORE_INDEX} in each row")
    return counted, lengths


def _not_empty(tokens: Tensor) -> Tensor:
    if tokens.ndim != 1 or not len(tokens):
        raise ValueError(f"expected the tokens of one answer, shape (T,) with T >= 1, got shape {tuple(tokens.shape)}")
    return tokens
