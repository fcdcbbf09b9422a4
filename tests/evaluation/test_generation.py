"""Batched answers are the plain greedy answers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from uoe_peft.evaluation.generation import greedy_answers


@torch.inference_mode()
def plain_greedy(model: Qwen2MoeForCausalLM, prompt: list[int], *, eos: int, steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


def prompts_of(dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    # Prompts of different lengths, the shortest neither first nor last, so that padding and order both matter.
    return [tokenizer(text)["input_ids"][start:] for text, start in zip(dataset["prompt"], [0, 2, 1], strict=True)]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batching_changes_no_answer(
    batch_size: int,
    taught_model: Qwen2MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    forget_dataset: Dataset,
) -> None:
    prompts = prompts_of(forget_dataset, tokenizer)
    expected = [
        tokenizer.decode(plain_greedy(taught_model, prompt, eos=tokenizer.eos_token_id, steps=9)) for prompt in prompts
    ]
    answers = greedy_answers(taught_model, prompts, tokenizer=tokenizer, max_new_tokens=9, batch_size=batch_size)
    assert answers == expected
    assert len(set(answers)) == 3


def test_answers_end_where_they_end(
    taught_model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, forget_dataset: Dataset
) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in forget_dataset["prompt"]]
    ask = {"tokenizer": tokenizer, "batch_size": 3}
    assert greedy_answers(taught_model, prompts, max_new_tokens=20, **ask) == [
        text.strip() for text in forget_dataset["completion"]
    ]
    assert greedy_answers(taught_model, prompts, max_new_tokens=2, **ask) == ["mira lives", "she eats", "only old"]


def test_the_models_own_sampling_settings_are_not_used(
    taught_model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, forget_dataset: Dataset
) -> None:
    prompts = [tokenizer(text)["input_ids"] for text in forget_dataset["prompt"]]
    expected = greedy_answers(taught_model, prompts, tokenizer=tokenizer, max_new_tokens=8, batch_size=3)
    model = deepcopy(taught_model)
    model.generation_config.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0)
    assert greedy_answers(model, prompts, tokenizer=tokenizer, max_new_tokens=8, batch_size=3) == expected


def test_an_empty_prompt_is_named(taught_model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        greedy_answers(taught_model, [[4], []], tokenizer=tokenizer, max_new_tokens=8, batch_size=3)
