"""One model, asked all sets: what it says and how likely it finds the truth, example by example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from uoe_peft.evaluation.evidence import RoutingRecord
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.likelihood import choice_nll, score_answers
from uoe_peft.evaluation.metrics import (
    AnswerTokens,
    exact_memorization,
    extraction_strength,
    mia_loss,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_zlib,
    probability_w_options,
    repetition,
    rouge_l_recall,
    truth_ratio,
)
from uoe_peft.evaluation.questions import Choices, Questions
from uoe_peft.evaluation.resume import AnswerStore, model_key
from uoe_peft.evaluation.switching import answering
from uoe_peft.moe.passes import find_streamed
from uoe_peft.moe.routing import record_routing

Asked = Questions | Choices
Row = dict[str, Any]
AnyModel = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Asking:
    """How models are asked.

    Attributes:
        tokenizer: Reads and writes for all of them.
        batch_size: Rows a forward pass.
        max_new_tokens: Where an answer is cut.
        cache_dir: Where generated answers are kept, so that an evaluation that was stopped goes on; None: nowhere.
    """

    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_new_tokens: int
    cache_dir: str | PathLike[str] | None = None


@dataclass(frozen=True)
class Measured:
    """What one model did.

    Attributes:
        rows: By set, one mapping an example, from the name of a metric to its value; `answer` is what was said.
        routing: By set, where its tokens went; empty where it was not watched.
    """

    rows: dict[str, list[Row]]
    routing: dict[str, RoutingRecord] = field(default_factory=dict)


def measure(
    model: AnyModel, sets: Mapping[str, Asked], asking: Asking, *, called: str, num_experts: Mapping[int, int]
) -> Measured:
    """Ask a model all sets, each question once for its likelihoods and once for an answer.

    Args:
        model: The model; its adapter is as the caller wants it.
        sets: Questions by the name of their set.
        asking: How.
        called: What progress bars and errors call the model.
        num_experts: E by decoder layer, to record its routing; empty: not to.

    Raises:
        ValueError: A token is beyond the model's vocabulary, or logits are not finite.
        ImportError: The package `rouge-score` is missing.
    """
    rows: dict[str, list[Row]] = {}
    routing: dict[str, RoutingRecord] = {}
    with answering(model):
        cache_dir = asking.cache_dir if find_streamed(model) is None else None  # there are no answers to store
        stored = f"{model_key(model)}-{asking.max_new_tokens}" if cache_dir is not None else ""
        store = AnswerStore(cache_dir, stored)
        for name, asked in sets.items():
            desc = f"{called}, {name} set"
            if isinstance(asked, Choices):
                rows[name] = _chosen(model, asked, asking, desc=desc)
                continue
            record = RoutingRecord(num_experts) if num_experts else None
            rows[name] = _likelihoods(model, asked, asking, record, desc=desc)
            _add_answers(rows[name], asked, _answers(model, asked, asking, store, desc=desc))
            if record:
                routing[name] = record
    return Measured(rows, routing)


def _chosen(model: AnyModel, asked: Choices, asking: Asking, *, desc: str) -> list[Row]:
    found = choice_nll(model, asked.examples, batch_size=asking.batch_size, desc=f"{desc}: options")
    rows = []
    for nll, label in zip(found, asked.labels, strict=True):
        others = [value for place, value in enumerate(nll) if place != label]
        # A tie is no knowledge: a model that finds all options alike has none right.
        rows.append(
            {"probability": probability_w_options(nll[label], others), "accuracy": float(nll[label] < min(others))}
        )
    return rows


def _likelihoods(
    model: AnyModel, asked: Questions, asking: Asking, record: RoutingRecord | None, *, desc: str
) -> list[Row]:
    def score(examples: Sequence[Mapping[str, Any]], what: str, watch: Any = None) -> list[AnswerTokens]:
        return score_answers(model, examples, batch_size=asking.batch_size, desc=f"{desc}: {what}", watch=watch)

    with record_routing(model) if record else nullcontext() as trace:
        watch = (lambda rows, mask: record.add(trace, mask)) if record and trace is not None else None
        tokens = score(asked.examples, "probability", watch)
    rows = [
        _of_tokens(answer, _spelled(asking.tokenizer, example))
        for answer, example in zip(tokens, asked.examples, strict=True)
    ]
    if not asked.false_answers:
        return rows
    flat = score([answer for answers in asked.false_answers for answer in answers], "false answers")
    false_nll = iter(-mia_loss(answer.log_probs) for answer in flat)
    true = score(asked.paraphrases, "paraphrased answers") if asked.paraphrases else tokens
    for row, own, answers, other in zip(rows, tokens, asked.false_answers, true, strict=True):
        nll = [next(false_nll) for _ in answers]
        row["truth_ratio"] = truth_ratio(-mia_loss(other.log_probs), nll)
        row["probability_w_options"] = probability_w_options(-mia_loss(own.log_probs), nll)
    return rows


def _of_tokens(tokens: AnswerTokens, text: str) -> Row:
    return {
        "probability": float(tokens.log_probs.mean().exp()),
        "exact_memorization": exact_memorization(tokens.is_argmax),
        "extraction_strength": extraction_strength(tokens.is_argmax),
        "mia_loss": mia_loss(tokens.log_probs),
        "mia_zlib": mia_zlib(tokens.log_probs, text),
        "mia_min_k": mia_min_k(tokens.log_probs),
        "mia_min_k_plus_plus": mia_min_k_plus_plus(tokens.standardised),
    }


def _spelled(tokenizer: PreTrainedTokenizerBase, example: Mapping[str, Any]) -> str:
    """The text of an example's answer tokens."""
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    return str(tokenizer.decode([token for token, label in pairs if label >= 0], skip_special_tokens=True))


def _answers(model: AnyModel, asked: Questions, asking: Asking, store: AnswerStore, *, desc: str) -> list[str]:
    if not asked.prompts or find_streamed(model) is not None:  # every new token would read the checkpoint again
        return []
    return greedy_answers(
        model,
        asked.prompts,
        tokenizer=asking.tokenizer,
        max_new_tokens=asking.max_new_tokens,
        batch_size=asking.batch_size,
        desc=f"{desc}: answers",
        store=store,
    )


def _add_answers(rows: list[Row], asked: Questions, answers: Sequence[str]) -> None:
    if not answers:
        return
    recalls = rouge_l_recall(answers, asked.references)
    for place, answer, recall in zip(asked.asked, answers, recalls, strict=True):
        rows[place] |= {"answer": answer, "rouge_l_recall": recall, "repetition": repetition(answer)}
