"""Ask the base model, the unlearned one and a retrained one the same questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from uoe_peft.data import collate
from uoe_peft.data.tokenization import text_tokenizer
from uoe_peft.evaluation.batching import batches_by_length
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import answer_probability, rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of
from uoe_peft.evaluation.report import AnswerScores, ModelName, SetName, UnlearningReport


def evaluate_unlearning(
    model: PeftModel,
    *,
    forget_dataset: Dataset | IterableDataset,
    retain_dataset: Dataset | IterableDataset,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    retrained_model: PreTrainedModel | PeftModel | None = None,
    max_examples: int | None = None,
    batch_size: int = 16,
    max_length: int | None = 1024,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> UnlearningReport:
    """Answer probability and ROUGE-L recall on both sets, with the adapter off (base) and on (unlearned).

    ROUGE-L is of the last answer of a row, generated greedily from all that stands before it; the probability is over
    every answer token of the row. It measures what the model says when asked plainly: knowledge that a paraphrase or a
    few steps of relearning would bring back goes unseen.

    Args:
        model: A `PeftModel` whose adapter is the unlearning.
        forget_dataset: What should be forgotten, in any type that training reads. Rows of plain text have no prompt to
            answer: they get no ROUGE-L, and a note says so.
        retain_dataset: What should be kept, likewise.
        processing_class: The model's tokenizer, or a processor that holds one.
        retrained_model: A model trained without the forget set, the gold reference; it reads the same tokens.
        max_examples: Draw so many rows of each set; None for all. A streaming set needs it.
        batch_size: Rows a forward pass.
        max_length: Longest sequence in tokens, prompt and answer; None for no limit.
        max_new_tokens: Where a generated answer is cut.
        seed: Of the draw.

    Returns:
        The scores of "base", "unlearned" and, where given, "retrained".

    Raises:
        TypeError: `model` has no adapter to switch off, or a set is no `Dataset`.
        ValueError: The adapter is switched off or merged already; a set is empty or has no usable columns or answers;
            `max_examples`, `batch_size` or `max_new_tokens` is below 1.
        ImportError: The package `rouge-score` is missing.
    """
    _check(model, batch_size=batch_size, max_new_tokens=max_new_tokens)
    tokenizer = text_tokenizer(processing_class)
    given: dict[SetName, Dataset | IterableDataset] = {"forget": forget_dataset, "retain": retain_dataset}
    sets = {
        name: questions_of(dataset, tokenizer, max_length=max_length, max_examples=max_examples, seed=seed, name=name)
        for name, dataset in given.items()
    }

    def score(asked: PreTrainedModel | PeftModel, called: ModelName) -> dict[SetName, AnswerScores]:
        with _evaluating(asked):
            return {
                name: _score(
                    asked,
                    questions,
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    desc=f"{called}, {name} set",
                )
                for name, questions in sets.items()
            }

    scores: dict[ModelName, dict[SetName, AnswerScores]] = {}
    with model.disable_adapter():
        scores["base"] = score(model, "base")
    scores["unlearned"] = score(model, "unlearned")
    if retrained_model is not None:
        scores["retrained"] = score(retrained_model, "retrained")
    notes = (questions.note for questions in sets.values())
    return UnlearningReport(scores=scores, notes=tuple(note for note in notes if note))


def _score(
    model: PreTrainedModel | PeftModel,
    questions: Questions,
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
    desc: str,
) -> AnswerScores:
    recalls: list[float] = []
    if questions.prompts:
        answers = greedy_answers(
            model,
            questions.prompts,
            tokenizer=tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            desc=f"{desc}: answers",
        )
        recalls = rouge_l_recall(answers, questions.references)
    probabilities = _probabilities(model, questions, batch_size=batch_size, desc=f"{desc}: probability")
    return AnswerScores(
        rouge_l_recall=fmean(recalls) if recalls else None,
        probability=fmean(probabilities),
        num_examples=len(probabilities),
    )


@torch.inference_mode()
def _probabilities(
    model: PreTrainedModel | PeftModel, questions: Questions, *, batch_size: int, desc: str
) -> list[float]:
    examples = questions.examples
    lengths = [len(example["input_ids"]) for example in examples]
    probabilities: list[float] = []
    with tqdm(total=len(examples), desc=desc, unit="answer", leave=False) as bar:
        for rows in batches_by_length(lengths, batch_size=batch_size):
            batch = collate([examples[row] for row in rows], pad_token_id=0)
            input_ids, mask, labels = (
                batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")
            )
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
            probabilities += answer_probability(logits, labels).tolist()
            bar.update(len(rows))
    return probabilities


@contextmanager
def _evaluating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Without dropout; afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check(model: object, *, batch_size: int, max_new_tokens: int) -> None:
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"model must be a PeftModel, whose adapter can be switched off, got {type(model).__name__}; "
            "use get_peft_model, PeftModel.from_pretrained or a trainer's model"
        )
    status = model.get_model_status()
    if status.merged_adapters:
        raise ValueError(
            f"the adapters {status.merged_adapters} are merged, and switching them off would unmerge them; call "
            "unmerge_adapter() first"
        )
    if status.enabled is False:
        raise ValueError("the adapter is switched off, so base and unlearned would be the same model; enable it first")
    for name, value in {"batch_size": batch_size, "max_new_tokens": max_new_tokens}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
