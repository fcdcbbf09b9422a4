"""Every attack by its name."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.evaluation.attacks.conftest import Recorder, adapted, as_it_was
from uoe_peft.evaluation.attacks import AdapterAttack, AttackName, run_attack


def names() -> list[str]:
    return [name for name in get_args(AttackName) if isinstance(name, str)]


def options(name: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    rows = Dataset.from_list([{"prompt": "who knows mira ?", "completion": " only old tomas"}])
    trained = {"dataset": rows, "processing_class": tokenizer}
    given: dict[str, dict[str, Any]] = {
        "relearning": {**trained, "steps": [1]},
        "soft_prompt": {**trained, "steps": [1]},
        "gcg": {**trained, "num_rows": 1, "num_steps": 1, "num_tokens": 2, "search_width": 8, "top_k": 8},
        "paraphrase": {"column": "question_2"},
        "few_shot": {"examples": [("who knows tomas ?", " everybody does")]},
        "int4": {"group_size": 8},
    }
    return given.get(name, {})


@pytest.mark.parametrize("name", names())
def test_every_name_runs_its_attack(
    qwen: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, request: pytest.FixtureRequest
) -> None:
    if name == "gcg":
        request.getfixturevalue("quick_nanogcg")
    model = adapted(qwen)
    with as_it_was(model):
        result = run_attack(name, model, score=Recorder(), **options(name, tokenizer))  # type: ignore[arg-type]
    assert result.name == name
    assert {"forget_x", "retain_x"} <= set(result.before) & set(result.after)


@pytest.mark.parametrize("name", names())
def test_all_but_the_adapters_attacks_run_on_a_plain_model(
    qwen: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, request: pytest.FixtureRequest
) -> None:
    if name == "gcg":
        request.getfixturevalue("quick_nanogcg")
    more: dict[str, Any] = {"expert_forcing": {"base": adapted(qwen)}, "silenced_expert": {"experts": [(0, 1)]}}
    given = options(name, tokenizer) | more.get(name, {})
    with as_it_was(qwen):
        if name in get_args(AdapterAttack):
            with pytest.raises(TypeError, match=name):
                run_attack(name, qwen, score=Recorder(), **given)  # type: ignore[arg-type]
        else:
            run_attack(name, qwen, score=Recorder(), **given)  # type: ignore[arg-type]


def test_known_scores_are_not_measured_again(qwen: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """One call less than with unknown ones."""
    model = adapted(qwen)
    for name in names():
        if name == "gcg":
            continue
        calls = []
        for before in ({"forget_x": 0.25}, None):
            score = Recorder(lambda call: {"forget_x": 0.5})
            given = options(name, tokenizer)
            result = run_attack(name, model, score=score, before=before, **given)  # type: ignore[arg-type]
            calls.append(len(score.models))
            assert result.before == (before or {"forget_x": 0.5}), name
        assert calls[0] == calls[1] - 1, name


def test_an_unknown_name_lists_the_known(qwen: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"relearning.*scale_sweep"):
        run_attack("bribery", qwen, score=Recorder())  # type: ignore[arg-type]
