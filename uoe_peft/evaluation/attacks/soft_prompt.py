"""Trained vectors before the question: can any input make the model say it?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import nn

from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.evaluation.attacks.copies import plain_copy
from uoe_peft.evaluation.attacks.fitting import check_budget, checked_steps, fit, rows_to_fit
from uoe_peft.evaluation.attacks.result import AttackResult, CausalLM, Score, Scores, baseline, measured, strongest


def soft_prompt(
    model: CausalLM,
    dataset: Dataset | IterableDataset,
    *,
    processing_class: ProcessingClass,
    score: Score,
    num_virtual_tokens: int = 8,
    steps: Sequence[int] = (25, 50),
    learning_rate: float = 1e-2,
    batch_size: int = 8,
    max_length: int | None = 1024,
    seed: int = 0,
    before: Scores | None = None,
) -> AttackResult:
    """Trains vectors that stand before every question, PEFT's prompt tuning; no weight of the model changes.

    They are trained on some rows and scored on others: a prompt can also be taught the answers, and on its own rows it
    would be. What a model that never knew the facts "recovers" is the baseline.

    Args:
        model: Any causal language model.
        dataset: The rows to train on, in any of TRL's types.
        processing_class: The model's tokenizer, or a processor that holds one.
        score: Measures forget and retain.
        num_virtual_tokens: Number of vectors; they start at the embeddings of random tokens.
        steps: After how many steps to measure, ascending; the last one is the budget.
        learning_rate: Of AdamW, constant.
        batch_size: Rows a step.
        max_length: Longest sequence in tokens, without the vectors; None for no limit.
        seed: Of the order of the rows and of the first vectors.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        Curve: by "step", 0 included, where there are no vectors. After: `strongest` of it.

    Raises:
        TypeError: `dataset` is no `Dataset`.
        ValueError: A budget or a set of rows is empty; the loss or a score is not finite; weights are offloaded, or an
            adapter cannot be merged.
    """
    marks = checked_steps(steps)
    check_budget(batch_size=batch_size, learning_rate=learning_rate)
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens must be at least 1, got {num_virtual_tokens}")
    examples = rows_to_fit(dataset, processing_class, max_length=max_length, name="soft prompt")
    start = baseline(score, model, before)
    prompted = _with_prompt(model, num_virtual_tokens=int(num_virtual_tokens), seed=seed)
    curve: list[Scores] = [{"step": 0, **start}]
    for step in fit(
        prompted,
        [parameter for parameter in prompted.parameters() if parameter.requires_grad],
        examples,
        num_steps=marks[-1],
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        desc="soft prompt",
    ):
        if step in marks:
            with _without_warning():
                curve.append({"step": step, **measured(score, prompted)})
    settings = {
        "num_virtual_tokens": int(num_virtual_tokens),
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "rows": len(examples),
        "seed": seed,
    }
    return AttackResult("soft_prompt", before=start, after=strongest(curve), curve=curve, settings=settings)


def _with_prompt(model: CausalLM, *, num_virtual_tokens: int, seed: int) -> PeftModel:
    """A copy with a fresh prompt, whose logits are those of the visible tokens."""
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prompted = get_peft_model(plain_copy(model), config).eval()

    def drop_virtual(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits[:, num_virtual_tokens:]
        return output

    prompted.register_forward_hook(drop_virtual)  # `generate` does not pass here, and needs no such cut
    prompted.get_base_model().register_forward_pre_hook(_padding_first, with_kwargs=True)
    return prompted


def _padding_first(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Put left padding before the prompt, and not between prompt and question, where PEFT leaves it.

    The prompt was trained beside the question, and so it must stand when answers are generated. Logits of the question
    stay where they are.
    """
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not mask[:, -1].all():
        return args, kwargs  # not padded on the left
    order = mask.argsort(dim=1, stable=True)  # 0 is padding
    mask = mask.gather(1, order)
    embeds = kwargs.get("inputs_embeds")  # (B, virtual + S, H); None once they are in the cache
    num_new = 1 if embeds is None else embeds.shape[1]
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -num_new:]
    moved = {} if embeds is None else {"inputs_embeds": embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))}
    return args, {**kwargs, **moved, "attention_mask": mask, "position_ids": positions}


@contextmanager
def _without_warning() -> Iterator[None]:
    """PEFT says that it leaves out position ids; `_padding_first` puts them in again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)
        yield
