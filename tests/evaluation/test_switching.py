"""The adapter off and weaker; afterwards nothing has changed."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2MoeForCausalLM

from uoe_peft.evaluation.switching import adapter_off, answering, scaled
from uoe_peft.tuner import UOEConfig

IDS = torch.tensor([[4, 7, 9, 5, 8]])


def uoe(model: Qwen2MoeForCausalLM) -> PeftModel:
    tuned = get_peft_model(deepcopy(model), UOEConfig(target_experts=[(1, 2), (0, 3)]))
    for name, parameter in tuned.named_parameters():
        if ".uoe_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return tuned.eval()


def test_off_is_the_base_and_frozen_parameters_stay_frozen(
    taught_model: Qwen2MoeForCausalLM, scrambled: PeftModel
) -> None:
    scrambled.requires_grad_(False)
    kept = next(name for name, _ in scrambled.named_parameters() if "lora_A" in name)
    scrambled.get_parameter(kept).requires_grad_(True)
    with torch.no_grad(), adapter_off(scrambled):
        assert torch.equal(scrambled(IDS).logits, taught_model(IDS).logits)
    assert [name for name, parameter in scrambled.named_parameters() if parameter.requires_grad] == [kept]
    with torch.no_grad():
        assert not torch.equal(scrambled(IDS).logits, taught_model(IDS).logits)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["lora", "uoe"])
def test_a_scaled_adapter_is_one_with_smaller_weights(
    kind: str, factor: float, taught_model: Qwen2MoeForCausalLM, scrambled: PeftModel
) -> None:
    model = uoe(taught_model) if kind == "uoe" else scrambled
    by_hand = deepcopy(model)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if ".uoe_" in name or "lora_B" in name:
                parameter.mul_(factor)
        before = model(IDS).logits
        with scaled(model, factor):
            torch.testing.assert_close(model(IDS).logits, by_hand(IDS).logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", ["lora", "uoe"])
def test_scales_do_not_depend_on_those_before_them(
    kind: str, taught_model: Qwen2MoeForCausalLM, scrambled: PeftModel
) -> None:
    model = uoe(taught_model) if kind == "uoe" else scrambled
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "scaling", None), dict)]
    with torch.no_grad():
        logits = model(IDS).logits
        for factor in (0.0, 0.5, 0.25, 1.0, 2.0):
            own = [dict(layer.scaling) for layer in layers]
            with scaled(model, factor):
                assert [layer.scaling["default"] for layer in layers] == [factor * o["default"] for o in own]
                with scaled(model, 0.5):  # of what is there
                    assert [layer.scaling["default"] for layer in layers] == [factor * 0.5 * o["default"] for o in own]
        assert torch.equal(model(IDS).logits, logits)
    if kind == "uoe":  # nor do those that are set afterwards
        model.base_model.set_strength(0.5)
        assert {layer.scaling["default"] for layer in layers} == {0.5}


def test_the_scale_comes_back_after_an_error(taught_model: Qwen2MoeForCausalLM) -> None:
    model = uoe(taught_model)
    with torch.no_grad():
        before = model(IDS).logits
        with pytest.raises(KeyError), scaled(model, 0.0):
            raise KeyError
        assert torch.equal(model(IDS).logits, before)


def test_what_cannot_be_scaled_is_refused(taught_model: Qwen2MoeForCausalLM, scrambled: PeftModel) -> None:
    with pytest.raises(ValueError, match="finite and at least 0, got -1"), scaled(scrambled, -1):
        pass
    with pytest.raises(ValueError, match="has no layers with a scale"), scaled(taught_model, 0.5):
        pass
    config = LoraConfig(target_modules=["v_proj"], r=2, modules_to_save=["lm_head"])
    whole = get_peft_model(deepcopy(taught_model), config)
    with pytest.raises(ValueError, match="lm_head"), scaled(whole, 0.5):
        pass
    scrambled.merge_adapter()
    with pytest.raises(ValueError, match="merged"), scaled(scrambled, 0.5):
        pass


def test_each_module_gets_its_own_mode_back(scrambled: PeftModel) -> None:
    scrambled.train()
    scrambled.get_base_model().lm_head.eval()
    with answering(scrambled):
        assert not any(module.training for module in scrambled.modules())
        assert not torch.is_grad_enabled()
    assert scrambled.training
    assert not scrambled.get_base_model().lm_head.training
