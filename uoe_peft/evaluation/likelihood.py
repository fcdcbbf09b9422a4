"""How likely a model finds given answers: batched forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from uoe_peft.data import IGNORE_INDEX, collate
from uoe_peft.evaluation.batching import batches_by_length
from uoe_peft.evaluation.metrics import AnswerTokens, answer_tokens
from uoe_peft.moe.passes import run_passes

Watch = Callable[[list[int], Tensor], None]


@torch.inference_mode()
def score_answers(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    desc: str,
    watch: Watch | None = None,
) -> list[AnswerTokens]:
    """What a model thinks of each answer's tokens.

    Args:
        model: A causal language model in evaluation mode.
        examples: Rows with `input_ids` and `labels`, each with an answer token.
        batch_size: Rows a forward pass.
        desc: Title of the progress bar, and what errors call the set.
        watch: Called after each pass with the numbers of its rows and the attention mask, shape `(B, S)`.

    Returns:
        One value an example, in their order, on the CPU.

    Raises:
        ValueError: A token is beyond the model's vocabulary, or logits are not finite.
    """
    check_vocabulary(model, examples, desc=desc)
    found: list[AnswerTokens | None] = [None] * len(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    grouped = list(batches_by_length(lengths, batch_size=batch_size))

    def score(rows: list[int]) -> tuple[list[AnswerTokens], Tensor]:
        batch = collate([examples[row] for row in rows], pad_token_id=0)
        input_ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        try:
            return answer_tokens(logits, labels), mask
        except ValueError as error:
            raise ValueError(f"{desc}, a batch with the examples {rows[:5]}...: {error}") from error

    with tqdm(total=len(examples), desc=desc, unit="answer", leave=False) as bar:
        passes = run_passes(model, (partial(score, rows) for rows in grouped))
        for rows, ((scored, mask), _) in zip(grouped, passes, strict=True):
            for row, tokens in zip(rows, scored, strict=True):
                found[row] = AnswerTokens(tokens.log_probs.cpu(), tokens.is_argmax.cpu(), tokens.standardised.cpu())
            if watch is not None:
                watch(rows, mask)
            bar.update(len(rows))
    return [tokens for tokens in found if tokens is not None]


@torch.inference_mode()
def choice_nll(
    model: PreTrainedModel | PeftModel,
    questions: Sequence[Sequence[Mapping[str, Any]]],
    *,
    batch_size: int,
    desc: str,
) -> list[list[float]]:
    """Mean negative log-likelihood of a token of each option of each question, in nats.

    A question is passed once for all its options of one token, since what stands before them is the same.

    Args:
        model: A causal language model in evaluation mode.
        questions: For each question, its options as rows with `input_ids` and `labels`.
        batch_size: Rows a forward pass.
        desc: Title of the progress bar, and what errors call the set.

    Raises:
        ValueError: A token is beyond the model's vocabulary, or logits are not finite.
    """
    options = [option for question in questions for option in question]
    check_vocabulary(model, options, desc=desc)
    # The last token of an option is predicted, not read: options that differ in it alone share a pass.
    passed = {tuple(option["input_ids"][:-1]): None for option in options}
    places = {ids: place for place, ids in enumerate(passed)}
    wanted: list[list[int]] = [[] for _ in passed]
    for number, option in enumerate(options):
        wanted[places[tuple(option["input_ids"][:-1])]].append(number)
    found = [0.0] * len(options)
    sequences = list(passed)

    def score(rows: list[int]) -> dict[int, float]:
        batch = collate([{"input_ids": sequences[row]} for row in rows], pad_token_id=0)
        input_ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return {
            number: _mean_nll(row_logits, options[number], desc=desc)
            for row, row_logits in zip(rows, logits, strict=True)
            for number in wanted[row]
        }

    grouped = list(batches_by_length([len(ids) for ids in sequences], batch_size=batch_size))
    with tqdm(total=len(sequences), desc=desc, unit="question", leave=False) as bar:
        passes = run_passes(model, (partial(score, rows) for rows in grouped))
        for rows, (scored, _) in zip(grouped, passes, strict=True):
            for number, value in scored.items():
                found[number] = value
            bar.update(len(rows))
    values = iter(found)
    return [[next(values) for _ in question] for question in questions]


def check_vocabulary(model: PreTrainedModel | PeftModel, examples: Sequence[Mapping[str, Any]], *, desc: str) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        ValueError: There is such a token.
    """
    size = vocab_size(model)
    highest = max((max(example["input_ids"]) for example in examples), default=0)
    if highest >= size:
        raise ValueError(
            f"{desc}: token {highest} is beyond the {size} tokens of {type(model).__name__}; the tokenizer is another "
            "model's: all models of an evaluation must read the same tokens"
        )


def vocab_size(model: Any) -> int:
    """Number of tokens that a model reads."""
    return int(model.config.get_text_config().vocab_size)


def _mean_nll(logits: Tensor, option: Mapping[str, Any], *, desc: str) -> float:
    """Args: logits: of one row, shape `(S, V)`."""
    labels = torch.tensor(option["labels"])
    start, end = int((labels != IGNORE_INDEX).nonzero()[0]), len(labels)
    log_probs = logits[start - 1 : end - 1].float().log_softmax(-1).cpu()
    nll = -log_probs.gather(1, labels[start:, None]).mean()
    if not bool(torch.isfinite(nll)):
        raise ValueError(
            f"{desc}: the logits of an option are not finite; the model is broken or overflows in its dtype"
        )
    return float(nll)
