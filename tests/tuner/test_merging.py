"""A merge is done in full or not at all, and what comes out of the wrappers is an ordinary model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig

from tests.tuner.conftest import base_state, make_config, randomise
from uoe_peft.tuner import UOEExpertsLayer, UOELayer, UOERouterLayer, merging

Logits = Callable[..., Tensor]


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize("kind", [UOEExpertsLayer, UOERouterLayer])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("already_merged", [False, True])
def test_a_merge_that_fails_inside_a_layer_leaves_it_as_it_was(
    qwen: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[UOELayer],
    error: type[BaseException],
    already_merged: bool,
) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    model.add_adapter("second", make_config(qwen))
    randomise(model)
    randomise(model, adapter_name="second", seed=1)
    untouched = base_state(model)
    if already_merged:
        model.merge_adapter(["default"])
    before, calls, edited_slice = base_state(model), [], kind.edited_slice

    def fail(layer: UOELayer, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise error
        return edited_slice(layer, *args, **kwargs)

    monkeypatch.setattr(merging, "_MERGE_BLOCK", 64)  # several blocks of rows in each slice
    with monkeypatch.context() as patch, pytest.raises(error), pytest.warns() if already_merged else patch.context():
        patch.setattr(kind, "edited_slice", fail)
        model.merge_adapter(["second"])
    assert same(before, base_state(model))
    merged = {tuple(layer.merged_adapters) for layer in model.modules() if isinstance(layer, UOELayer)}
    assert merged == {("default",) if already_merged else ()}
    if already_merged:
        model.unmerge_adapter()
        assert same(untouched, base_state(model))


def test_slices_are_kept_aside_in_the_dtype_that_they_have_now(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    randomise(model)
    exact = base_state(model)
    for dtype in (torch.bfloat16, torch.float32):
        model.to(dtype)
        for name, tensor in model.state_dict().items():
            if ".uoe_" not in name:
                tensor.copy_(exact[name.replace(".base_layer", "")])
        before = base_state(model)
        model.merge_adapter()
        assert not same(before, base_state(model))
        model.unmerge_adapter()
        assert same(before, base_state(model))


def test_an_adapter_named_twice_is_merged_once(qwen: PreTrainedModel, logits: Logits) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    unmerged = logits(model)
    model.merge_adapter(["default", "default"])
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-5)
    for names, named in ((["default", "absent"], r"\['absent'\]"), ([], r"\[\]")):
        with pytest.raises(ValueError, match=f"adapters {named} not found"):
            model.merge_adapter(names)


def test_unmerging_what_is_not_merged_is_said_to_the_caller(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    layer = next(module for module in model.modules() if isinstance(module, UOELayer))
    with pytest.warns(UserWarning, match="Already unmerged") as warnings:
        layer.unmerge()
    assert [warning.filename for warning in warnings] == [__file__]


def test_embeddings_that_an_adapter_unties_are_saved_untied(logits: Logits, tmp_path: Any) -> None:
    config = Qwen2MoeConfig(
        vocab_size=100, hidden_size=32, intermediate_size=56, moe_intermediate_size=24, num_experts=6,
        shared_expert_intermediate_size=40, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        model = get_peft_model(base, make_config(base, modules_to_save=["lm_head"])).eval()
    randomise(model)
    head = base.lm_head.modules_to_save["default"]
    head.weight.data = 3 * head.weight.data
    said = logits(model)
    with pytest.warns(UserWarning, match="no longer tied after merging"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), said, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), said, rtol=1e-4, atol=1e-5)


def test_a_replaced_base_layer_is_the_one_that_is_edited(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen, train_router=False))
    randomise(model)
    layer = next(module for module in model.modules() if isinstance(module, UOEExpertsLayer))
    other = copy.deepcopy(layer.get_base_layer())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.5)
    layer.base_layer = other
    expected = other.down_proj[1] + layer.uoe_delta["default"]["down_proj"][0]
    hidden, index = torch.randn(5, 32), torch.tensor([[1, 0]] * 5)
    weights = torch.rand(5, 2)
    unmerged = layer(hidden, index, weights)
    model.merge_adapter()
    torch.testing.assert_close(other.down_proj[1], expected)
    torch.testing.assert_close(other(hidden, index, weights), unmerged, rtol=1e-4, atol=1e-5)
