"""What a router's matrix is multiplied with is seen in every family, with and without an adapter on the router."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from tests.families import HIDDEN, SUPPORTED, build, logits, token_ids
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks, unwrap
from uoe_peft.moe.inputs.routers import record_router_input
from uoe_peft.tuner import UOEConfig


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_gradient_of_the_matrix_is_made_of_the_recorded_inputs(family: str) -> None:
    # The gradient of W in `x W^T` is a sum of outer products with x: its rows lie in the span of the x, which fill
    # 18 of 32 dimensions here, or 16 of 16 for zaya. Any other tensor leaves something over.
    model = build(family)
    block = find_moe_blocks(model)[-1]
    with record_router_input(block) as recorded:
        logits(model, token_ids()).square().mean().backward()
    inputs = recorded().double()  # (T, H)
    assert inputs.shape == (token_ids().numel(), block.hidden_size)
    gradient = unwrap(block.router).get_parameter(block.gate_name).grad
    assert gradient is not None and gradient.abs().sum() > 0
    expected = gradient.double().T  # (H, E)
    found = inputs.T @ torch.linalg.lstsq(inputs.T, expected, driver="gelsd").solution  # inputs may repeat
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_inputs_times_the_matrix_are_the_logits() -> None:
    model = build("gpt_oss")
    block = find_moe_blocks(model)[1]
    outputs: list[Tensor] = []
    handle = block.router.register_forward_hook(lambda router, args, output: outputs.append(output[0]))
    with torch.no_grad(), record_router_input(block) as recorded:
        logits(model, token_ids())
    handle.remove()
    router = unwrap(block.router)
    expected = recorded() @ router.get_parameter("weight").T + router.get_parameter("bias")
    torch.testing.assert_close(outputs[0], expected)


@pytest.mark.parametrize("family", ["qwen2_moe", "gemma4", "listed, linear router"])
def test_an_edited_router_is_watched_all_the_same(family: str) -> None:
    model = build(family)
    with torch.no_grad(), record_router_input(find_moe_blocks(model)[0]) as recorded:
        logits(model, token_ids())
        expected = recorded()
    layer_idx = find_moe_blocks(model)[0].layer_idx
    edited = get_peft_model(model, UOEConfig(target_experts=[(layer_idx, 1)], init_weights=False))
    with torch.no_grad(), record_router_input(find_moe_blocks(edited)[0]) as recorded:
        logits(edited, token_ids())
        assert torch.equal(recorded(), expected)


def test_the_latest_pass_counts_and_hooks_are_gone_afterwards() -> None:
    model = build("qwen2_moe")
    block = find_moe_blocks(model)[0]
    with torch.no_grad(), record_router_input(block) as recorded:
        logits(model, token_ids())
        logits(model, token_ids()[:1])
        assert recorded().shape == (9, HIDDEN)
    kept = recorded()
    with torch.no_grad():
        logits(model, token_ids().flip(0))
    assert recorded() is kept or torch.equal(recorded(), kept)


def test_nothing_seen_is_an_error_that_names_the_router() -> None:
    block = find_moe_blocks(build("qwen2_moe"))[0]
    with (
        record_router_input(block) as recorded,
        pytest.raises(UnsupportedModelError, match=r"input of weight of model.layers.0.mlp.gate, a Qwen2MoeTopKRouter"),
    ):
        recorded()
