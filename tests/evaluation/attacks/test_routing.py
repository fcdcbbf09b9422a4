"""Routing is replayed, experts fall silent, and the model comes out as it went in."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.evaluation.attacks.conftest import Recorder, adapted, as_it_was, logits_of
from tests.evaluation.attacks.test_copies import edited_by_hand
from tests.families import build, token_ids
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.evaluation.attacks import expert_forcing, shared_path, silenced_expert

FAMILIES = [
    "qwen2_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "llama4",
    "listed, linear router",
    "listed, router module",
]


def generated(model: Any, *, masked: int = 0) -> torch.Tensor:
    """Greedy continuations of two prompts, the first with some padding on the left."""
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[0, :masked] = 0
    return model.generate(  # type: ignore[no-any-return]
        input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
    )


def with_routers_of(base: PreTrainedModel, edited: PreTrainedModel) -> torch.Tensor:
    """Logits of an edited Qwen2Moe whose routers say, by hand, what the base's said of the same tokens."""
    said: list[Any] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: said.append(output))
        for layer in base.model.layers
    ]
    logits_of(base)
    for handle in handles:
        handle.remove()
    deaf = copy.deepcopy(edited)
    for layer, output in zip(deaf.model.layers, said, strict=True):
        layer.mlp.gate.forward = lambda *args, output=output: output
    return logits_of(deaf)


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_routers_of_an_adapter_that_edits_nothing_else_give_the_base(family: str) -> None:
    base = build(family).eval()
    model = adapted(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and ".uoe_" in name:
                parameter.zero_()
    score = Recorder()
    with as_it_was(model):
        expert_forcing(model, score=score)
    assert not torch.allclose(score.logits[0], logits_of(base), atol=1e-3)
    torch.testing.assert_close(score.logits[1], logits_of(base), atol=0, rtol=0)


def test_edited_experts_answer_under_the_routing_of_the_base(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    expected = with_routers_of(qwen, edited_by_hand(qwen, model))
    score = Recorder()
    expert_forcing(model, score=score)
    torch.testing.assert_close(score.logits[1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(score.logits[0], expected, atol=1e-3)


def test_a_model_without_an_adapter_is_forced_by_its_base(qwen: PreTrainedModel) -> None:
    model = edited_by_hand(qwen, adapted(qwen))
    score = Recorder()
    with as_it_was(model), as_it_was(qwen):
        result = expert_forcing(model, score=score, base=qwen)  # type: ignore[arg-type]
    torch.testing.assert_close(score.logits[1], with_routers_of(qwen, model), atol=0, rtol=0)  # type: ignore[arg-type]
    assert result.settings == {"routing_of": "Qwen2MoeForCausalLM"}


def test_a_model_forced_by_itself_stays_what_it_is(qwen: PreTrainedModel) -> None:
    score = Recorder()
    expert_forcing(copy.deepcopy(qwen), score=score, base=qwen)
    assert torch.equal(score.logits[0], score.logits[1])


@pytest.mark.parametrize("masked", [0, 3])
def test_generation_with_a_cache_is_forced_token_by_token(qwen: PreTrainedModel, masked: int) -> None:
    model = adapted(qwen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and ".uoe_" in name:
                parameter.zero_()
    answers: list[torch.Tensor] = []

    def score(given: Any) -> dict[str, float]:
        answers.extend([generated(given, masked=masked), generated(given, masked=masked)])
        return {"forget_x": 0.0}

    with as_it_was(model):
        expert_forcing(model, score=score)
    expected = generated(qwen, masked=masked)
    assert not torch.equal(answers[0], expected)
    assert torch.equal(answers[2], expected) and torch.equal(answers[3], expected)


def test_a_cache_that_the_base_has_not_filled_is_refused(qwen: PreTrainedModel) -> None:
    cache = qwen(input_ids=token_ids(), use_cache=True).past_key_values

    def score(given: Any) -> dict[str, float]:
        given(input_ids=token_ids()[:, :1], past_key_values=cache)
        return {"forget_x": 0.0}

    model = adapted(qwen)
    with as_it_was(model), pytest.raises(ValueError, match="has not seen"):
        expert_forcing(model, score=score, before={"forget_x": 0.0})


def test_forcing_without_the_base_is_refused_by_name(qwen: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="expert_forcing without a base needs a PeftModel"):
        expert_forcing(qwen, score=Recorder())
    model = adapted(qwen)
    with pytest.raises(ValueError, match="part of the model"):
        expert_forcing(model, score=Recorder(), base=model.get_base_model())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number of experts"):
        expert_forcing(qwen, score=Recorder(), base=build("deepseek_v3"))
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(UnsupportedModelError):
        expert_forcing(dense, score=Recorder(), base=qwen)


def test_a_router_that_is_not_called_is_refused(qwen: PreTrainedModel) -> None:
    model = copy.deepcopy(qwen)
    gate = model.model.layers[1].mlp.gate
    model.model.layers[1].mlp.forward = lambda hidden: hidden * gate.weight.sum()
    with pytest.raises(UnsupportedModelError, match=r"layers \[1\].*not called"):
        expert_forcing(model, score=Recorder(), base=copy.deepcopy(model), before={"forget_x": 0.0})


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_silent_expert_is_one_with_zero_weights(family: str) -> None:
    base = build(family).eval()
    model = adapted(base, train_router=False)
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expected.model.layers[1].mlp.experts.parameters():
            parameter[[2, 4]] = 0
    score = Recorder()
    with as_it_was(model):
        result = silenced_expert(model, score=score)
    torch.testing.assert_close(score.logits[1], logits_of(expected), atol=1e-5, rtol=1e-5)
    assert result.settings == {"experts": [[1, 2], [1, 4]]}


def test_any_expert_of_any_model_can_be_silenced(qwen: PreTrainedModel) -> None:
    expected = copy.deepcopy(qwen)
    with torch.no_grad():
        expected.model.layers[0].mlp.experts.down_proj[3] = 0
    score = Recorder()
    with as_it_was(qwen):
        silenced_expert(qwen, score=score, experts=[(np.int64(0), np.int64(3))])  # type: ignore[list-item]
    torch.testing.assert_close(score.logits[1], logits_of(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("experts", "error", "message"),
    [
        (None, TypeError, "UOE adapter"),
        ([], ValueError, "empty"),
        ([(7, 0)], ValueError, "layers"),
        ([(0, 0), (1, 99)], ValueError, "99"),
        ([(0.5, 1)], TypeError, "integer"),
    ],
)
def test_experts_that_are_not_there_are_refused(
    qwen: PreTrainedModel, experts: Any, error: type[Exception], message: str
) -> None:
    with as_it_was(qwen), pytest.raises(error, match=message):
        silenced_expert(qwen, score=Recorder(), experts=experts)


@pytest.mark.parametrize("family", ["qwen2_moe", "llama4", "listed, linear router"])
def test_on_the_shared_path_no_routed_expert_says_anything(family: str) -> None:
    base = build(family).eval()
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if ".experts." in name:
                parameter.zero_()
    model = adapted(base)
    for given in (base, model):
        score = Recorder()
        with as_it_was(given):
            shared_path(given, score=score)
        torch.testing.assert_close(score.logits[1], logits_of(expected), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attack", [expert_forcing, silenced_expert, shared_path])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_failing_score_leaves_no_hook_behind(qwen: PreTrainedModel, attack: Any, fail_at: int) -> None:
    model = adapted(qwen).train()
    with as_it_was(model), pytest.raises(RuntimeError, match="the score fails"):
        attack(model, score=Recorder(fail_at=fail_at))
