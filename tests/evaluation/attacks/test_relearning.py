"""Relearning is plain AdamW on a copy, as a loop by hand does it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.evaluation.attacks.conftest import Recorder, adapted, as_it_was, logits_of
from tests.families import build
from uoe_peft.evaluation.attacks import fitting, relearning


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Three rows of unequal lengths; the labels of prompts are -100."""
    return Dataset.from_list(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
            {"input_ids": [9, 8, 7, 6, 5, 4], "labels": [-100, 8, 7, 6, 5, 4]},
            {"input_ids": [3, 11], "labels": [-100, 11]},
        ]
    )


def by_hand(base: PreTrainedModel, rows: Dataset, *, steps: int, rate: float) -> PreTrainedModel:
    """AdamW from its formula, all rows in each step, one forward pass a row."""
    model = copy.deepcopy(base)
    parameters = list(model.parameters())
    first = [torch.zeros_like(parameter) for parameter in parameters]
    second = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(1, steps + 1):
        nll, count = torch.zeros(()), 0
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            answers = [place for place, label in enumerate(row["labels"]) if label != -100 and place > 0]
            for place in answers:
                nll = nll - F.log_softmax(logits[place - 1], dim=-1)[row["labels"][place]]
            count += len(answers)
        gradients = torch.autograd.grad(nll / count, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, m, v, gradient in zip(parameters, first, second, gradients, strict=True):
                if gradient is None:
                    continue
                m.mul_(0.9).add_(0.1 * gradient)
                v.mul_(0.999).add_(0.001 * gradient**2)
                m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.999**step)
                parameter -= rate * m_hat / (v_hat.sqrt() + 1e-8)
    return model


def test_weights_move_as_adamw_by_hand_moves_them(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    score = Recorder()
    with as_it_was(qwen):
        result = relearning(
            qwen, rows, processing_class=tokenizer, score=score, steps=[1, 3], learning_rate=1e-3, batch_size=3
        )
    assert [point["step"] for point in result.curve] == [0, 1, 3]
    for given, steps in zip(score.logits, (0, 1, 3), strict=True):
        expected = logits_of(by_hand(qwen, rows, steps=steps, rate=1e-3))
        torch.testing.assert_close(given, expected, atol=2e-4, rtol=2e-4)


def test_the_maximum_over_the_steps_is_reported(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    told = [0.2, 0.6, 0.9, 0.4]
    score = Recorder(lambda call: {"forget_x": told[call], "retain_x": call / 10})
    result = relearning(qwen, rows, processing_class=tokenizer, score=score, steps=[1, 2, 3])
    assert result.before == {"forget_x": 0.2, "retain_x": 0.0}
    assert result.after == {"step": 2, "forget_x": 0.9, "retain_x": 0.2}
    assert [point["forget_x"] for point in result.curve] == told
    assert result.settings == {"learning_rate": 2e-4, "batch_size": 8, "rows": 3, "seed": 0}


def test_an_adapter_is_merged_first_and_left_alone(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(qwen).train()
    model.requires_grad_(False)
    score = Recorder(lambda call: {"forget_x": 0.0})
    with as_it_was(model):
        relearning(
            model,
            rows,
            processing_class=tokenizer,
            score=score,
            steps=[np.int64(1)],
            batch_size=np.int64(2),  # type: ignore[arg-type]
            before={"forget_x": 0.5},
        )
    (trained,) = score.models
    assert type(trained) is type(qwen) and not trained.training


def test_bfloat16_is_trained_in_float32(rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("qwen2_moe", dtype=torch.bfloat16).eval()
    score = Recorder(lambda call: {"forget_x": 0.0})
    with as_it_was(model):
        relearning(model, rows, processing_class=tokenizer, score=score, steps=[1], before={"forget_x": 0.0})
    assert score.models[0].dtype is torch.float32


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_score_that_fails_leaves_the_model_alone(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast, fail_at: int
) -> None:
    model = adapted(qwen)
    with as_it_was(model), pytest.raises(RuntimeError, match="the score fails"):
        relearning(model, rows, processing_class=tokenizer, score=Recorder(fail_at=fail_at), steps=[1, 2])


def test_a_set_smaller_than_a_batch_is_repeated(
    qwen: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def watch(model: Any, examples: Any) -> torch.Tensor:
        seen.append([example["input_ids"][0] for example in examples])
        return next(model.parameters()).sum() * 0

    monkeypatch.setattr(fitting, "answer_loss", watch)
    three = Dataset.from_list([{"input_ids": [token, 2]} for token in (5, 6, 7)])
    score = Recorder(lambda call: {"forget_x": 0.0})
    relearning(qwen, three, processing_class=tokenizer, score=score, steps=[3], batch_size=4)
    flat = [token for batch in seen for token in batch]
    assert [len(batch) for batch in seen] == [4, 4, 4]
    assert all(sorted(flat[start : start + 3]) == [5, 6, 7] for start in range(0, 12, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": []}, "steps"),
        ({"steps": [3, 2]}, "ascending"),
        ({"steps": [0, 2]}, "steps"),
        ({"steps": [1.5]}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 1e30, "steps": [4]}, "lower learning_rate"),
        ({"dataset": Dataset.from_list([])}, "empty"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(
    qwen: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
    message: str,
) -> None:
    given = {"dataset": rows, "steps": [1], **options}
    score = Recorder(lambda call: {"forget_x": 0.0})
    with as_it_was(qwen), pytest.raises(ValueError, match=message):
        relearning(qwen, processing_class=tokenizer, score=score, **given)
