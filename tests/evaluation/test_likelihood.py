"""Options and answers against one plain forward pass each."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from uoe_peft.evaluation.likelihood import choice_nll, score_answers
from uoe_peft.evaluation.questions import choices_of


def plain_nll(model: Qwen2MoeForCausalLM, prompt: list[int], option: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + option])).logits[0].double()
    chances = [logits[len(prompt) + i - 1].softmax(-1)[token] for i, token in enumerate(option)]
    return -sum(math.log(float(chance)) for chance in chances) / len(option)


def test_options_equal_a_pass_each(taught_model: Qwen2MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list(
        [
            {"prompt": "where does mira live ?", "options": [" mira", " tomas", " he"], "label": 0},
            {"prompt": "what does tomas eat ?", "options": [" he eats", " she"], "label": 1},
        ]
    )
    choices = choices_of(rows, tokenizer, max_length=None, name="mmlu")
    passes: list[int] = []
    handle = taught_model.register_forward_pre_hook(
        lambda m, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = choice_nll(taught_model, choices.examples, batch_size=2, desc="x")
    handle.remove()
    assert sum(passes) == 1 + 2  # three options of one word share a pass
    for row, nll in zip(rows, found, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        expected = [plain_nll(taught_model, prompt, tokenizer(option)["input_ids"]) for option in row["options"]]
        assert nll == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"label": 2}, "and 2"), ({"options": [" a"]}, "1 options"), ({"prompt": None}, "a NoneType")],
)
def test_questions_without_a_choice_are_refused(
    change: dict[str, object], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"prompt": "who", "options": [" a", " b"], "label": 0} | change
    with pytest.raises(ValueError, match=f"row 0 of the mmlu set needs a prompt of text.*{message}"):
        choices_of(Dataset.from_list([row]), tokenizer, max_length=None, name="mmlu")


def test_a_model_that_gives_no_numbers_is_named(
    taught_model: Qwen2MoeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = taught_model.lm_head.weight
    # pytest 9 takes an attribute that is in no `__dict__` away again instead of setting it back: the register it is.
    broken = torch.nn.Parameter(torch.full_like(weight, math.nan))
    monkeypatch.setitem(taught_model.lm_head._parameters, "weight", broken)
    example = {"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}
    with pytest.raises(ValueError, match=r"base, forget set, a batch with the examples \[0\].*not finite"):
        score_answers(taught_model, [example], batch_size=1, desc="base, forget set")
    with pytest.raises(ValueError, match="not finite"):
        choice_nll(taught_model, [[example, example]], batch_size=1, desc="options")


def test_tokens_of_another_model_are_named(taught_model: Qwen2MoeForCausalLM) -> None:
    size = taught_model.config.vocab_size
    with pytest.raises(ValueError, match=f"token {size} is beyond the {size} tokens of Qwen2Moe"):
        score_answers(taught_model, [{"input_ids": [4, size], "labels": [-100, size]}], batch_size=1, desc="x")
