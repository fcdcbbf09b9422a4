"""Copies are merged models; an adapter can be turned down in part, and nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from tests.evaluation.attacks.conftest import TARGETS, adapted, as_it_was, is_router, logits_of, perturb
from tests.families import build
from uoe_peft.evaluation.attacks.copies import AdapterScale, edited_experts, plain_copy
from uoe_peft.tuner import UOEConfig, UOELayer


def edited_by_hand(base: PreTrainedModel, model: nn.Module, *, routers: bool = True, experts: bool = True) -> nn.Module:
    """A copy of the base with the adapter's deltas added to its weights."""
    edited = copy.deepcopy(base)
    parameters = dict(edited.named_parameters())
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if ".uoe_delta.default." not in name:
                continue
            path, key = name.removeprefix("base_model.model.").split(".uoe_delta.default.")
            if path.endswith("experts") and experts:
                for position, (_, expert) in enumerate(sorted(TARGETS)):
                    parameters[f"{path}.{key}"][expert] += delta[position]
            if not path.endswith("experts") and routers:
                parameters[f"{path}.{key}"] += delta[0]
    return edited


def test_a_copy_is_the_merged_model(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    expected = logits_of(edited_by_hand(qwen, model))
    with as_it_was(model):
        plain = plain_copy(model)
    assert type(plain) is type(qwen)
    assert not any(isinstance(module, UOELayer) for module in plain.modules())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    torch.testing.assert_close(logits_of(plain), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, logits_of(qwen), atol=1e-2)


def test_a_copy_runs_on_its_own_weights_also_where_trl_has_wrapped_the_forward(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    add_fused_lm_head(model.get_base_model())  # as every trainer of TRL does
    before = logits_of(model)
    plain = plain_copy(model)
    torch.testing.assert_close(logits_of(plain), before, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert not logits_of(plain).any()
    assert torch.equal(logits_of(model), before)


def test_a_merged_adapter_stays_merged(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    model.merge_adapter()
    assert torch.equal(logits_of(plain_copy(model)), logits_of(model))


def test_an_adapter_that_is_off_is_left_out(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    with model.disable_adapter():
        assert torch.equal(logits_of(plain_copy(model)), logits_of(qwen))


def test_a_model_without_an_adapter_is_copied(qwen: PreTrainedModel) -> None:
    qwen_in_training = copy.deepcopy(qwen).train()
    with as_it_was(qwen_in_training):
        plain = plain_copy(qwen_in_training)
        plain.get_input_embeddings().weight.data.zero_()
    assert not plain.training


def test_an_offloaded_model_is_refused(qwen: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="offloaded"):
        plain_copy(copy.deepcopy(qwen).to("meta"))


def test_a_prompt_cannot_be_merged(qwen: PreTrainedModel) -> None:
    prompted = get_peft_model(copy.deepcopy(qwen), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="cannot be merged"):
        plain_copy(prompted)


@pytest.mark.parametrize("train_router", [True, False])
def test_at_scale_0_stands_the_base(qwen: PreTrainedModel, train_router: bool) -> None:
    model = adapted(qwen, train_router=train_router)
    with as_it_was(model):
        with AdapterScale.of(model, attack="x").times(0.0):
            assert torch.equal(logits_of(model), logits_of(qwen))
        assert not torch.equal(logits_of(model), logits_of(qwen))


@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "listed, linear router"])
def test_at_scale_0_stands_the_base_of_other_families(family: str) -> None:
    base = build(family).eval()
    model = adapted(base)
    with AdapterScale.of(model, attack="x").times(0.0):
        torch.testing.assert_close(logits_of(model), logits_of(base), atol=0, rtol=0)


def test_the_present_scale_counts(qwen: PreTrainedModel) -> None:
    model, expected = adapted(qwen), adapted(qwen)
    for layer in model.modules():
        if isinstance(layer, UOELayer):
            layer.set_scale("default", 0.5)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if ".uoe_" in name:
                parameter *= 0.25
    with as_it_was(model), AdapterScale.of(model, attack="x").times(0.5):
        torch.testing.assert_close(logits_of(model), logits_of(expected))


def test_lora_too_can_be_turned_down(qwen: PreTrainedModel) -> None:
    model = perturb(get_peft_model(copy.deepcopy(qwen), LoraConfig(target_modules=["q_proj"], r=3))).eval()
    assert not torch.allclose(logits_of(model), logits_of(qwen))
    with as_it_was(model), AdapterScale.of(model, attack="x").times(0.0):
        assert torch.equal(logits_of(model), logits_of(qwen))


def test_only_active_adapters_are_turned_down(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    expected = logits_of(model)
    model.add_adapter("other", UOEConfig(target_experts=[(0, 3)], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(logits_of(model), expected)
    model.set_adapter("other")
    with AdapterScale.of(model, attack="x").times(0.0):
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(logits_of(model), expected)


def test_a_failure_inside_gives_the_scale_back(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    with as_it_was(model), pytest.raises(RuntimeError), AdapterScale.of(model, attack="x").times(0.3):
        raise RuntimeError


def test_what_is_no_scaled_sum_is_refused(qwen: PreTrainedModel) -> None:
    def wrapped(config: object) -> nn.Module:
        return get_peft_model(copy.deepcopy(qwen), config)  # type: ignore[arg-type]

    refused = {
        "modules_to_save": UOEConfig(target_experts=TARGETS, modules_to_save=["lm_head"]),
        "use_dora": LoraConfig(target_modules=["q_proj"], use_dora=True),
        "bias": LoraConfig(target_modules=["q_proj"], bias="all"),
        "IA3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    }
    for reason, config in refused.items():
        with pytest.raises(ValueError, match=reason):
            AdapterScale.of(wrapped(config), attack="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x needs a PeftModel"):
        AdapterScale.of(qwen, attack="x")


def test_a_merged_or_disabled_adapter_is_refused(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    with model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        AdapterScale.of(model, attack="x")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        AdapterScale.of(model, attack="x")


def test_no_such_layer_is_refused(qwen: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="change nothing there"):
        AdapterScale.of(adapted(qwen, train_router=False), attack="x", layers=is_router)


def test_edited_experts_are_the_active_adapters(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    assert edited_experts(model, attack="x") == sorted(TARGETS)
    with pytest.raises(TypeError, match="UOE adapter"):
        edited_experts(get_peft_model(copy.deepcopy(qwen), LoraConfig(target_modules=["q_proj"])), attack="x")
    with pytest.raises(TypeError, match="UOE adapter"):
        edited_experts(qwen, attack="x")
