"""A suite as attacks ask it: plain, reworded, from another column."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2MoeForCausalLM

from uoe_peft.evaluation import SuiteScore, plain_suite
from uoe_peft.evaluation.score import _apply


def test_questions_are_reworded_before_they_are_asked(
    taught_model: Qwen2MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    forget_dataset: Dataset,
    retain_dataset: Dataset,
) -> None:
    swapped = forget_dataset.add_column("other", [text.replace("mira", "tomas") for text in forget_dataset["prompt"]])
    score = SuiteScore(plain_suite(swapped, retain_dataset), tokenizer, max_new_tokens=10)
    plain = score(taught_model)
    assert plain["forget_rouge_l_recall"] == plain["retain_rouge_l_recall"] == 1.0
    by_column = score(taught_model, column="other")
    by_hand = score(taught_model, prompts=lambda text: text.replace("mira", "tomas"))
    assert by_column["forget_rouge_l_recall"] < 0.6
    assert by_column["forget_probability"] == pytest.approx(by_hand["forget_probability"])
    assert by_column["retain_probability"] == plain["retain_probability"]
    with pytest.raises(ValueError, match="no set has the column 'nowhere'"):
        score(taught_model, column="nowhere")


def test_of_a_conversation_the_last_user_turn_is_reworded() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert _apply(str.upper, turns, "forget") == [*turns[:2], {"role": "user", "content": "C"}]
    with pytest.raises(ValueError, match="neither text nor a conversation"):
        _apply(str.upper, [{"role": "system", "content": "a"}], "forget")
