"""Answers are found again by the same model, and by no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from tests.evaluation.conftest import new_model
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.resume import AnswerStore, model_key


def test_only_what_is_missing_is_generated(
    taught_model: Qwen2MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    forget_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in forget_dataset["prompt"]]
    settings = {"tokenizer": tokenizer, "max_new_tokens": 8, "batch_size": 1}
    whole = greedy_answers(taught_model, prompts, **settings)
    store = AnswerStore(tmp_path, "k")
    generate, calls = taught_model.generate, []

    def dying(**inputs: torch.Tensor) -> torch.Tensor:
        calls.append(inputs["input_ids"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(**inputs)

    monkeypatch.setattr(taught_model, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        greedy_answers(taught_model, prompts, store=store, **settings)
    (file,) = tmp_path.iterdir()
    with file.open("a") as stream:
        stream.write('["half a li')  # what a killed process leaves behind
    calls[:] = [None] * 10
    assert greedy_answers(taught_model, prompts, store=AnswerStore(tmp_path, "k"), **settings) == whole
    assert len(calls) == 11
    assert greedy_answers(taught_model, prompts, store=AnswerStore(tmp_path, "k"), **settings) == whole
    assert len(calls) == 11
    assert AnswerStore(tmp_path, "another").get(prompts[0]) is None


def test_no_folder_no_file(tmp_path: Path) -> None:
    store = AnswerStore(None, "k")
    store.add([[1, 2]], ["x\u2028y\n"])
    assert store.get([1, 2]) == "x\u2028y\n"
    assert store.get([2, 1]) is None
    kept = AnswerStore(tmp_path, "k")
    kept.add([[1, 2]], ["x\u2028y\n"])
    assert AnswerStore(tmp_path, "k").get([1, 2]) == "x\u2028y\n"


def test_one_bit_makes_another_key(tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = new_model(tokenizer), new_model(tokenizer)
    assert model_key(one) == model_key(other)
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj[3, 2, 1] += 1e-7
    assert model_key(one) != model_key(other)
