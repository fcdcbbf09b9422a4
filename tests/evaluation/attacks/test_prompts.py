"""What is asked under the attacks that only ask otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.evaluation.attacks.conftest import Recorder, as_it_was
from uoe_peft.evaluation.attacks import few_shot, paraphrase, prefix


def asked(score: Recorder) -> list[Any]:
    return [call["prompts"]("Q?") if "prompts" in call else call.get("column") for call in score.asked]


def told(call: int) -> dict[str, float]:
    return {"forget_x": [0.1, 0.3, 0.8, 0.2][call], "retain_x": 1.0 - call / 10}


def test_a_paraphrase_is_another_column(qwen: PreTrainedModel) -> None:
    score = Recorder(told)
    with as_it_was(qwen):
        result = paraphrase(qwen, score=score, column="question_2")
    assert asked(score) == [None, "question_2"]
    assert (result.before["forget_x"], result.after["forget_x"]) == (0.1, 0.3)
    with pytest.raises(ValueError, match="column"):
        paraphrase(qwen, score=score, column="")


def test_every_prefix_is_tried_and_the_best_counts(qwen: PreTrainedModel) -> None:
    score = Recorder(told)
    result = prefix(qwen, score=score, prefixes=["a ", "b ", "c "])
    assert asked(score) == [None, "a Q?", "b Q?", "c Q?"]
    assert result.after == {"prefix": 1, "forget_x": 0.8, "retain_x": 0.8}
    assert result.settings["prefixes"][int(result.after["prefix"])] == "b "


def test_one_text_is_one_prefix(qwen: PreTrainedModel) -> None:
    score = Recorder(told)
    prefix(qwen, score=score, prefixes="Say: ")
    assert asked(score) == [None, "Say: Q?"]


def test_examples_are_doubled(qwen: PreTrainedModel) -> None:
    score = Recorder(told)
    examples = [("1?", " one"), ("2?", " two"), ("3?", " three")]
    result = few_shot(qwen, score=score, examples=examples, separator="|")
    assert asked(score) == [None, "1? one|Q?", "1? one|2? two|Q?", "1? one|2? two|3? three|Q?"]
    assert [point["shots"] for point in result.curve] == [1, 2, 3]
    assert result.after["shots"] == 2


@pytest.mark.parametrize(("number", "shots"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (5, [1, 2, 4, 5])])
def test_all_examples_are_used_in_the_end(qwen: PreTrainedModel, number: int, shots: list[int]) -> None:
    result = few_shot(qwen, score=Recorder(lambda call: {"forget_x": 0.0}), examples=[("q", "a")] * number)
    assert [point["shots"] for point in result.curve] == shots


def test_nothing_to_put_before_is_refused(qwen: PreTrainedModel) -> None:
    score = Recorder(told)
    for prefixes in ([], ["a", ""]):
        with pytest.raises(ValueError, match="prefixes"):
            prefix(qwen, score=score, prefixes=prefixes)
    for examples in ([], [("q",)], [("q", "")], ["qa"], [(1, 2)]):
        with pytest.raises(ValueError, match="examples"):
            few_shot(qwen, score=score, examples=examples)  # type: ignore[arg-type]
    assert not score.asked
