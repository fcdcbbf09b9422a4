"""What is said after forgetting: language, or noise? Pure functions of strings and of likelihoods."""

from __future__ import annotations

import math
from collections.abc import Sequence


def distinct_n(text: str, *, n: int = 2) -> float:
    """Share of a text's runs of n words that are different from each other (https://arxiv.org/abs/1510.03055).

    Words are what white space separates: scripts without spaces are one word.

    Args:
        text: What was said.
        n: Words a run, at least 1.

    Returns:
        In (0, 1]; 1 for a text of fewer than n words, which cannot repeat itself.

    Raises:
        ValueError: `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    words = text.split()
    runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def repetition(text: str, *, n: int = 2) -> float:
    """Share of a text's runs of n words that were said before in it: `1 - distinct_n`, in [0, 1).

    Args and errors as in `distinct_n`.
    """
    return 1 - distinct_n(text, n=n)


def perplexity(nll: Sequence[float], num_tokens: Sequence[int]) -> float:
    """Perplexity of texts together, `exp(sum NLL / sum tokens)`.

    Under the base model, of what the unlearned one says: high for noise. Low does not mean sense: "the the the" is
    likely, too; see `repetition`.

    Args:
        nll: Negative log-likelihood of each text, summed over its tokens, in nats.
        num_tokens: Number of tokens of each text.

    Returns:
        At least 1; infinite where `exp` overflows.

    Raises:
        ValueError: The lengths differ, or there is no token.
    """
    if len(nll) != len(num_tokens):
        raise ValueError(f"got {len(nll)} likelihoods for {len(num_tokens)} texts")
    total = sum(num_tokens)
    if not total:
        raise ValueError("perplexity needs at least one token")
    mean = math.fsum(nll) / total
    return math.exp(mean) if mean < 709 else math.inf


def says_something_else(
    recall: float, repeated: float, perplexity: float, *, max_recall: float = 0.3, max_perplexity: float
) -> bool:
    """Whether an answer is a fluent other one: a refusal, or something that is not the truth, but is language.

    Judged by its words alone; a fluent answer that tells the truth in other words counts as another.

    Args:
        recall: ROUGE-L recall of the truth.
        repeated: `repetition` of the answer.
        perplexity: Of the answer under the base model; infinite for an empty answer, which is never fluent.
        max_recall: More of the truth than this is the truth.
        max_perplexity: Above it, it is noise.
    """
    return recall <= max_recall and repeated <= 0.5 and perplexity <= max_perplexity


def rr2r(forget: Sequence[bool], retain: Sequence[bool]) -> float:
    """Share of forget prompts that get a fluent other answer, times the share of retain prompts that do not.

    In the manner of RR2R of https://arxiv.org/abs/2605.08765, which asks a judge for refusals; here the words decide
    (`says_something_else`), so the numbers do not compare with the paper's.

    Args:
        forget: For each forget prompt, whether it got one.
        retain: For each retain prompt.

    Returns:
        In [0, 1].

    Raises:
        ValueError: There are no prompts of one kind.
    """
    if not len(forget) or not len(retain):
        raise ValueError(f"rr2r needs forget and retain prompts, got {len(forget)} and {len(retain)}")
    return sum(forget) / len(forget) * (1 - sum(retain) / len(retain))
