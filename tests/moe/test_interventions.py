"""A pass can end at a router, and an expert can be left out, without a trace afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from tests.families import EXPERTS, build, logits, token_ids
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.blocks import find_moe_blocks
from uoe_peft.moe.interventions import find_decoder, run_until_routed, silence_expert
from uoe_peft.moe.routing import record_routing


@pytest.fixture(scope="module")
def qwen() -> PreTrainedModel:
    return build("qwen2_moe")


def test_the_pass_ends_at_the_layers_router(qwen: PreTrainedModel) -> None:
    ran: list[str] = []
    watched = ["model.layers.1.mlp.gate", "model.layers.1.mlp.experts", "model.layers.2", "model.norm", "lm_head"]
    handles = [
        qwen.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: ran.append(name)) for name in watched
    ]
    with torch.no_grad(), record_routing(qwen, layer_indices=[0, 1]) as trace, run_until_routed(qwen, 1) as run:
        run(input_ids=token_ids())
        early = {layer_idx: trace[layer_idx] for layer_idx in trace}
    for handle in handles:
        handle.remove()
    assert ran == ["model.layers.1.mlp.gate"]
    with torch.no_grad(), record_routing(qwen, layer_indices=[0, 1]) as trace:
        logits(qwen, token_ids())
    assert list(early) == list(trace) == [0, 1]
    for layer_idx, routing in early.items():
        assert torch.equal(routing.scores, trace[layer_idx].scores)
        assert torch.equal(routing.top_k_index, trace[layer_idx].top_k_index)


def test_a_whole_pass_after_the_context_is_whole(qwen: PreTrainedModel) -> None:
    expected = logits(qwen, token_ids())
    with torch.no_grad(), run_until_routed(qwen, 0) as run:
        run(input_ids=token_ids())
    assert torch.equal(logits(qwen, token_ids()), expected)


def test_errors_of_the_model_pass_through(qwen: PreTrainedModel) -> None:
    with run_until_routed(qwen, 0) as run, pytest.raises(IndexError):
        run(input_ids=token_ids() + 10_000)


def test_an_encoder_decoder_is_refused() -> None:
    with (
        pytest.raises(UnsupportedModelError, match="encoder"),
        run_until_routed(build("switch_transformers"), 0),
    ):
        pass


def test_the_decoder_is_found_under_the_head(qwen: PreTrainedModel) -> None:
    assert find_decoder(qwen) is qwen.model
    assert find_decoder(qwen.model) is qwen.model


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama4", "listed, linear router"])
def test_a_silent_expert_contributes_what_a_zero_matrix_would(family: str) -> None:
    model = build(family)
    block = find_moe_blocks(model)[1]
    expected = copy.deepcopy(model)
    with torch.no_grad():
        storage = find_moe_blocks(expected)[1].storage
        storage.weight(storage.projections[-1], 2).zero_()
        unchanged = logits(model, token_ids())
        with silence_expert(block, 2):
            silenced = logits(model, token_ids())
        torch.testing.assert_close(silenced, logits(expected, token_ids()))
        assert not torch.allclose(silenced, unchanged)
        assert torch.equal(logits(model, token_ids()), unchanged)


def test_an_expert_out_of_range_is_named(qwen: PreTrainedModel) -> None:
    block = find_moe_blocks(qwen)[0]
    with pytest.raises(ValueError, match=f"has {EXPERTS} experts, got expert_idx={EXPERTS}"):
        silence_expert(block, EXPERTS).__enter__()
