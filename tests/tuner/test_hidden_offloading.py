"""Weights that are offloaded, or read past an adapter, where it does not show on the module itself."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from transformers import PreTrainedModel

from tests.families import build
from tests.tuner.conftest import make_config, randomise
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.tuner import UOELayer


@pytest.mark.parametrize("where", ["layer above", "beside another hook"])
def test_offloading_is_seen_wherever_its_hook_is(qwen: PreTrainedModel, where: str) -> None:
    config = make_config(qwen)
    offload = AlignDevicesHook(execution_device="cpu", offload=True, place_submodules=True)
    if where == "layer above":
        add_hook_to_module(qwen.model.layers[-1], offload)
    else:
        experts = find_moe_blocks(qwen)[-1].experts
        add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu"))
        add_hook_to_module(experts, offload, append=True)
    assert find_moe_blocks(qwen)[-1].experts.down_proj.is_meta
    with pytest.raises(UnsupportedModelError, match=r"cannot edit model.layers.\d.mlp.experts .* are offloaded"):
        get_peft_model(qwen, config)
    assert not any(isinstance(module, UOELayer) for module in qwen.modules())


def test_weights_without_a_hook_are_only_still_to_come(qwen: PreTrainedModel) -> None:
    config = make_config(qwen)
    assert get_peft_model(qwen.to("meta"), config).peft_config["default"].target_modules


def test_flattened_experts_are_not_read_past_an_adapter() -> None:
    base = build("dbrx")
    model = get_peft_model(base, make_config(base))
    randomise(model)
    experts = find_moe_blocks(model)[-1].experts
    with pytest.raises(RuntimeError, match=r"mlp of \w+ was read past the adapters \['default'\]"):
        _ = experts.mlp
    with model.disable_adapter():
        assert experts.mlp is experts.get_base_layer().mlp
    model.merge_adapter()
    assert torch.is_tensor(experts.mlp.w1)  # the weights themselves are edited now
