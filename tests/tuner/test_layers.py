"""What a fresh layer holds, and where: values, dtypes, devices; and what passes through a router that has no delta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.tuner.conftest import make_config
from uoe_peft.moe import find_moe_blocks, unwrap
from uoe_peft.tuner import UOELayer

Logits = Callable[..., Tensor]


def deltas(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".uoe_" in name}


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("delta_type", ["full", "low_rank"])
def test_random_values_keep_the_size_of_what_they_multiply(
    qwen: PreTrainedModel, delta_type: str, init_weights: bool
) -> None:
    config = make_config(qwen, delta_type=delta_type, r=17, init_weights=init_weights, train_router=False)
    found = deltas(get_peft_model(qwen, config))
    assert len(found) == (2 if delta_type == "full" else 4)
    for name, values in found.items():
        if init_weights and ".uoe_A." not in name:
            assert not values.any()
        else:  # normal, with a variance of 1 over the number of columns
            assert values.mean().abs() < 0.02
            assert values.square().mean() * values.shape[-1] == pytest.approx(1, rel=0.15)


def test_an_adapter_is_of_its_bases_dtype_unless_peft_casts_it(qwen: PreTrainedModel) -> None:
    qwen.to(torch.bfloat16)
    model = get_peft_model(qwen, make_config(qwen), autocast_adapter_dtype=False)
    assert {p.dtype for p in deltas(model).values()} == {torch.bfloat16}


def test_an_adapter_is_put_where_it_is_told_whatever_its_base_is(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    for layer in (module for module in model.modules() if isinstance(module, UOELayer)):
        layer.get_base_layer().to("meta")
        layer._move_adapter_to_device_of_base_layer("default", torch.device("cpu"))
    assert {p.device.type for p in deltas(model).values()} == {"cpu"}


def test_a_router_that_others_train_is_called_itself(qwen: PreTrainedModel, input_ids: Tensor) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    matrix = unwrap(find_moe_blocks(model)[-1].router).weight.requires_grad_(True)
    with model.disable_adapter():
        matrix.requires_grad_(True)
        model(input_ids).logits.square().mean().backward()
    assert matrix.grad is not None and matrix.grad.any()
