"""The LM head apart from the decoder gives what the model gives."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import SUPPORTED, build
from tests.moe.test_segments import _NO_MASK, inputs_of
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.lm_head import apply_lm_head, find_lm_head, no_logits, record_decoder_output
from uoe_peft.tuner import UOEConfig

# Remote code without `get_decoder`, a decoder that says it is its own, and models that are no language models.
_NOT_APART = ("llama4", "listed, router module", "listed, linear router", "diffusion_gemma", "openai_privacy_filter")


def family_inputs(model: PreTrainedModel, family: str) -> dict[str, Tensor]:
    inputs = inputs_of(model)
    return {"input_ids": inputs["input_ids"]} if family in _NO_MASK else inputs


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in _NOT_APART])
@torch.no_grad()
def test_chosen_hidden_states_get_the_models_own_logits(family: str) -> None:
    model = build(family)
    inputs = family_inputs(model, family)
    with record_decoder_output(model) as outputs:
        expected = model(**inputs, use_cache=False).logits
    mask = torch.zeros(expected.shape[:2], dtype=torch.bool)
    mask[0, 1] = mask[1, 2:4] = True
    found = apply_lm_head(model, outputs[0], outputs[0].last_hidden_state[mask])
    torch.testing.assert_close(found, expected[mask], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in _NOT_APART])
@torch.no_grad()
def test_a_pass_without_logits_makes_none(family: str) -> None:
    model = build(family)
    sizes: list[int] = []
    handle = find_lm_head(model).register_forward_hook(lambda head, args, output: sizes.append(output.numel()))
    with no_logits(model):
        logits = model(**family_inputs(model, family), use_cache=False).logits
    handle.remove()
    assert logits.shape[1] == 0
    assert sizes == [0]


@pytest.mark.parametrize("family", _NOT_APART)
def test_models_without_a_head_that_is_apart_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"has no (LM head|decoder apart)"):
        model = build(family)
        find_lm_head(model)
        with record_decoder_output(model):
            pass


def test_gradients_pass_through_the_head() -> None:
    model = build("qwen2_moe")
    with record_decoder_output(model) as outputs:
        logits = model(**inputs_of(model)).logits
    hidden = outputs[0].last_hidden_state
    expected = torch.autograd.grad(logits[0].square().sum(), hidden, retain_graph=True)[0]
    found = torch.autograd.grad(apply_lm_head(model, outputs[0], hidden[0]).square().sum(), hidden)[0]
    torch.testing.assert_close(found, expected)


def test_nothing_is_left_behind_even_after_an_error() -> None:
    model = get_peft_model(build("qwen2_moe"), UOEConfig(target_experts=[(1, 2)]))
    decoder = cast(Any, model).base_model.model.model
    with record_decoder_output(model) as outputs:
        model(**inputs_of(model))
    with pytest.raises(RuntimeError):
        apply_lm_head(model, outputs[0], torch.zeros(2, 5))
    assert "forward" not in decoder.__dict__
    with pytest.raises(RuntimeError, match="stop"), no_logits(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_was_set_on_the_decoder_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate sets its own."""
    model = build("qwen2_moe")
    decoder = cast(Any, model).model
    with record_decoder_output(model) as outputs:
        model(**inputs_of(model))
    own = decoder.forward
    decoder.forward = own
    apply_lm_head(model, outputs[0], outputs[0].last_hidden_state[0])
    assert decoder.__dict__["forward"] == own
