"""Routers or experts go back to the base's, as a model edited by hand shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.evaluation.attacks.conftest import Recorder, adapted, as_it_was, logits_of
from tests.evaluation.attacks.test_copies import edited_by_hand
from uoe_peft.evaluation.attacks import expert_restored, router_restored, scale_sweep


@pytest.mark.parametrize(
    ("attack", "kept"), [(router_restored, {"routers": False}), (expert_restored, {"experts": False})]
)
def test_one_part_is_the_bases_and_the_other_stays(qwen: PreTrainedModel, attack: Any, kept: dict[str, bool]) -> None:
    model = adapted(qwen)
    score = Recorder()
    with as_it_was(model):
        result = attack(model, score=score)
    torch.testing.assert_close(score.logits[0], logits_of(edited_by_hand(qwen, model)), atol=1e-5, rtol=1e-5)
    expected = logits_of(edited_by_hand(qwen, model, **kept))
    torch.testing.assert_close(score.logits[1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(score.logits[1], logits_of(qwen), atol=1e-3)
    assert result.name == attack.__name__
    assert result.settings == {"experts": [[1, 2], [1, 4]]}


def test_a_sweep_goes_from_the_adapter_to_the_base(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    half = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if ".uoe_" in name:
                parameter *= 0.5
    score = Recorder()
    with as_it_was(model):
        result = scale_sweep(model, score=score, scales=[0.5, 0])
    torch.testing.assert_close(score.logits[1], logits_of(half))
    assert torch.equal(score.logits[2], logits_of(qwen))
    assert [point["scale"] for point in result.curve] == [1.0, 0.5, 0.0]
    assert result.after == result.curve[-1]


def test_the_default_sweep_ends_at_the_base(qwen: PreTrainedModel) -> None:
    result = scale_sweep(adapted(qwen), score=Recorder(lambda call: {"forget_x": call}), before={"forget_x": -1})
    assert [point["forget_x"] for point in result.curve] == [-1, 0, 1, 2, 3, 4]
    assert result.after["scale"] == 0


@pytest.mark.parametrize("attack", [router_restored, expert_restored, scale_sweep])
def test_a_failing_score_leaves_the_adapter_as_it_was(qwen: PreTrainedModel, attack: Any) -> None:
    model = adapted(qwen).train()
    model.requires_grad_(False)
    for fail_at in (0, 1):
        with as_it_was(model), pytest.raises(RuntimeError, match="the score fails"):
            attack(model, score=Recorder(fail_at=fail_at))


def test_models_without_the_adapter_are_refused_by_name(qwen: PreTrainedModel) -> None:
    lora = get_peft_model(copy.deepcopy(qwen), LoraConfig(target_modules=["q_proj"]))
    score = Recorder()
    for attack in (router_restored, expert_restored, scale_sweep):
        with pytest.raises(TypeError, match=attack.__name__):
            attack(qwen, score=score)
    for attack in (router_restored, expert_restored):
        with pytest.raises(TypeError, match=attack.__name__):
            attack(lora, score=score)
    with pytest.raises(ValueError, match="change nothing there"):
        router_restored(adapted(qwen, train_router=False), score=score)
    assert not score.models


@pytest.mark.parametrize("scales", [[], [-0.1], [float("nan")], [float("inf")]])
def test_scales_that_make_no_sense_are_refused(qwen: PreTrainedModel, scales: list[float]) -> None:
    with pytest.raises(ValueError, match="scales"):
        scale_sweep(adapted(qwen), score=Recorder(), scales=scales)
