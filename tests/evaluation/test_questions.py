"""Which tokens are asked, and which are the answer."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from uoe_peft.evaluation.questions import last_answer, questions_of


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([-100, -100, 5, 6], slice(2, 4)),
        ([-100, 5, -100, 6, 7, -100], slice(3, 5)),  # a conversation: the last turn's answer
        ([4, 5], slice(0, 2)),
    ],
)
def test_the_last_run_of_answer_tokens(labels: list[int], expected: slice) -> None:
    assert last_answer(labels) == expected


def test_prompts_and_references_add_up_to_the_row(tokenizer: PreTrainedTokenizerFast, forget_dataset: Dataset) -> None:
    questions = questions_of(forget_dataset, tokenizer, max_length=None, max_examples=None, seed=0, name="forget")
    assert questions.references == [text.strip() for text in forget_dataset["completion"]]
    assert [tokenizer.decode(prompt) for prompt in questions.prompts] == list(forget_dataset["prompt"])
    assert questions.note == ""


def test_rows_without_a_prompt_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list(
        [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}, {"input_ids": [7, 8], "labels": [-100, 8]}]
    )
    questions = questions_of(rows, tokenizer, max_length=None, max_examples=None, seed=0, name="retain")
    assert questions.prompts == [[7]]
    assert questions.note == (
        "retain set: 1 of 2 rows are text without a prompt to answer, so ROUGE-L is over the other 1"
    )
