"""How well a model answers the testbed's questions."""

from __future__ import annotations

import statistics

import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE_INDEX = -100


@torch.inference_mode()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: list[str],
    max_new_tokens: int = 48,
    batch_size: int = 100,
) -> list[str]:
    """Return the greedy continuation of every prompt, up to the end-of-sequence token.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer; its padding side does not matter here.
        prompts: What to continue.
        max_new_tokens: Where to stop a continuation that does not end.
        batch_size: Prompts a forward pass.

    Returns:
        The continuations in the order of `prompts`, without surrounding white space.
    """
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True, padding_side="left")
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        continuations = generated[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in tokenizer.batch_decode(continuations, skip_special_tokens=True)]
    return answers


def rouge_recall(predictions: list[str], references: list[str]) -> float:
    """Return the mean ROUGE-L recall: the share of a reference's words that a prediction repeats in order.

    Args:
        predictions: What the model said.
        references: What it should have said, in the same order.

    Returns:
        Mean over the pairs, in [0, 1].
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(predictions, references, strict=True)
    return statistics.fmean(scorer.score(reference, prediction)["rougeL"].recall for prediction, reference in pairs)


@torch.inference_mode()
def answer_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, facts: Dataset, batch_size: int = 50
) -> float:
    """Return the mean over facts of `exp(-CE)`, CE the mean cross-entropy of the answer's tokens and its end.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        facts: Rows with `prompt` and `completion`.
        batch_size: Facts a forward pass.

    Returns:
        Mean probability a token, in [0, 1].
    """
    probabilities: list[float] = []
    for batch in facts.iter(batch_size=batch_size):
        input_ids, labels, mask = encode_facts(tokenizer, prompts=batch["prompt"], completions=batch["completion"])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
        )
        probabilities += (-nll.sum(1) / (labels[:, 1:] != IGNORE_INDEX).sum(1)).exp().tolist()
    return statistics.fmean(probabilities)


def encode_facts(
    tokenizer: PreTrainedTokenizerBase, *, prompts: list[str], completions: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return right-padded token ids, labels and attention mask of prompts followed by completions and eos.

    Args:
        tokenizer: Has a pad and an eos token.
        prompts: What is asked.
        completions: What is to be answered, in the same order.

    Returns:
        `input_ids`, `labels` (-100 on prompt and padding) and `attention_mask`, each of shape `(B, S)`.
    """
    prompt_ids = tokenizer(prompts)["input_ids"]
    completion_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(completions)["input_ids"]]
    rows = list(zip(prompt_ids, completion_ids, strict=True))
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORE_INDEX)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = 1
    return input_ids, labels, mask
