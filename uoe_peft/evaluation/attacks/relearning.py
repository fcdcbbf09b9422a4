"""A few steps of training on a handful of rows: is the rest remembered again?"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset, IterableDataset

from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.evaluation.attacks.copies import plain_copy
from uoe_peft.evaluation.attacks.fitting import check_budget, checked_steps, fit, rows_to_fit
from uoe_peft.evaluation.attacks.result import AttackResult, CausalLM, Score, Scores, baseline, measured, strongest


def relearning(
    model: CausalLM,
    dataset: Dataset | IterableDataset,
    *,
    processing_class: ProcessingClass,
    score: Score,
    steps: Sequence[int] = (6, 12, 24),
    learning_rate: float = 2e-4,
    batch_size: int = 8,
    max_length: int | None = 1024,
    seed: int = 0,
    before: Scores | None = None,
) -> AttackResult:
    """Fine-tunes all weights of a copy, and reports the maximum of the forget scores over the steps.

    The protocol of RepSelect, https://arxiv.org/abs/2606.17168. What it tells depends on the rows: a part of the forget
    set (the score must then ask the *other* part, or it measures learning), other facts of the same subjects, or benign
    text, which has nothing to do with what was forgotten. A model that never knew the facts is the baseline: what it
    "recovers" was guessed.

    The copy holds the merged adapter and is trained in float32, without dropout: in bfloat16 most of an update of
    `learning_rate` would be rounded away, and forgetting would look deeper than it is.

    Args:
        model: Any causal language model.
        dataset: The rows to learn from, in any of TRL's types.
        processing_class: The model's tokenizer, or a processor that holds one.
        score: Measures forget and retain.
        steps: After how many steps to measure, ascending; the last one is the budget.
        learning_rate: Of AdamW, constant.
        batch_size: Rows a step.
        max_length: Longest sequence in tokens; None for no limit.
        seed: Of the order of the rows.
        before: Scores of the model as it is; None: they are measured.

    Returns:
        Curve: by "step", 0 included, where nothing is learned yet. After: `strongest` of it.

    Raises:
        TypeError: `dataset` is no `Dataset`.
        ValueError: A budget or a set of rows is empty; the loss or a score is not finite; weights are offloaded, or an
            adapter cannot be merged.
    """
    marks = checked_steps(steps)
    check_budget(batch_size=batch_size, learning_rate=learning_rate)
    examples = rows_to_fit(dataset, processing_class, max_length=max_length, name="relearning")
    start = baseline(score, model, before)
    copied = plain_copy(model).float()
    curve: list[Scores] = [{"step": 0, **start}]
    for step in fit(
        copied,
        list(copied.parameters()),
        examples,
        num_steps=marks[-1],
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        desc="relearning",
    ):
        if step in marks:
            curve.append({"step": step, **measured(score, copied)})
    settings = {"learning_rate": learning_rate, "batch_size": batch_size, "rows": len(examples), "seed": seed}
    return AttackResult("relearning", before=start, after=strongest(curve), curve=curve, settings=settings)
