"""The search for a text before the question."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.evaluation.attacks.conftest import Recorder, adapted, as_it_was
from uoe_peft.evaluation.attacks import gcg
from uoe_peft.evaluation.attacks.gcg import _searching

ROWS = [("where does mira live ?", " mira lives"), ("what does mira eat ?", " she eats")]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in ROWS])


def nll(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> float:
    """Of a completion after a prompt, by hand."""
    ids, answer = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0]
    return float(F.cross_entropy(logits[len(ids) - 1 : -1], torch.tensor(answer)))


@pytest.mark.usefixtures("quick_nanogcg")
def test_the_text_makes_the_answer_likelier(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = adapted(qwen).train()
    score = Recorder(lambda call: {"forget_x": 0.0})
    with as_it_was(model):
        result = gcg(
            model,
            rows,
            processing_class=tokenizer,
            score=score,
            num_rows=1,
            num_steps=3,
            num_tokens=3,
            search_width=16,
            top_k=500,
        )
    ((prompt, text),) = result.settings["texts"].items()
    asked = score.asked[1]["prompts"]
    assert asked(prompt) == f"{text} {prompt}"
    assert asked(ROWS[1][0]) == ROWS[1][0]
    assert prompt == ROWS[0][0] and len(text.split()) == 3
    model.eval()
    before, after = (nll(model, tokenizer, f"{words} {prompt}", ROWS[0][1]) for words in ("x x x", text))
    assert after < before
    assert tokenizer.chat_template is None


def test_rows_without_prompt_and_completion_are_refused(
    qwen: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for bad in ([{"text": "x"}], [{"prompt": "x", "completion": ""}], [{"prompt": [], "completion": []}]):
        with pytest.raises(ValueError, match="gcg needs 1 rows"):
            gcg(qwen, Dataset.from_list(bad), processing_class=tokenizer, score=Recorder(), num_rows=1)


def test_too_few_rows_or_no_budget_are_refused(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="3 rows"):
        gcg(qwen, rows, processing_class=tokenizer, score=Recorder(), num_rows=3)
    with pytest.raises(ValueError, match="budget"):
        gcg(qwen, rows, processing_class=tokenizer, score=Recorder(), num_rows=1, num_steps=0)


def test_a_missing_package_is_named(
    qwen: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nanogcg", None)
    with as_it_was(qwen), pytest.raises(ImportError, match="pip install --no-deps nanogcg"):
        gcg(qwen, rows, processing_class=tokenizer, score=Recorder(), num_rows=1)


def test_a_search_that_fails_leaves_modes_and_random_state(qwen: PreTrainedModel) -> None:
    model = adapted(qwen).train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    with as_it_was(model), pytest.raises(RuntimeError), _searching(model, seed=0):
        assert not any(module.training for module in model.modules())
        torch.rand(1)
        raise RuntimeError
