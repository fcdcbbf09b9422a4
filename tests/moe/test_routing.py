"""Recorded routing is what the layer applied, in every kind of router, and carries gradient to it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.families import EXPERTS, build, logits, token_ids
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.blocks import find_moe_blocks
from uoe_peft.moe.routing import record_routing
from uoe_peft.tuner import UOEConfig

# Each router kind once: what the router returns, which activation, where the selection is made.
KINDS = {
    "qwen2_moe": "softmax",
    "mixtral": "softmax",
    "deepseek_v2": "softmax",  # in groups, scaled
    "gpt_oss": "softmax",  # over the selected logits only, with a bias
    "openai_privacy_filter": "softmax",  # divided by K
    "phimoe": "softmax",  # masked, and not proportional to the weights
    "gemma4": "probabilities",  # returned in place of logits, weights scaled by expert
    "dbrx": "softmax",  # applied outside the router
    "deepseek_v3": "sigmoid",  # in groups, with a correction bias
    "llama4": "sigmoid",  # router returns a table with zeros; experts get no selection
    "inkling": "sigmoid",  # normalised together with shared experts
    "deepseek_v4": "sqrtsoftplus",
    "switch_transformers": "softmax",  # selection as 0/1 marks
    "listed, router module": "softmax",  # returns no logits, experts are called one by one
    "listed, linear router": "softmax",  # returns nothing but logits, experts are called one by one
}
FOLLOW_WEIGHTS = sorted(set(KINDS) - {"phimoe", "gemma4"})


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """Models made so far; tests that change one take a copy."""
    return {}


def model_of(models: dict[str, PreTrainedModel], family: str) -> PreTrainedModel:
    if family not in models:
        models[family] = build(family)
    return models[family]


def expected_scores(kind: str, router_output: object) -> Tensor:
    """Scores by the definition: from the widest float tensor that the router returned."""
    parts = router_output if isinstance(router_output, tuple) else (router_output,)
    values = [p for p in parts if isinstance(p, Tensor) and p.is_floating_point() and p.shape[-1] == EXPERTS][-1]
    values = values.flatten(0, -2)
    match kind:
        case "softmax":
            return values.softmax(dim=-1)
        case "sigmoid":
            return values.sigmoid() / values.sigmoid().sum(dim=-1, keepdim=True)
        case "sqrtsoftplus":
            root = nn.functional.softplus(values).sqrt()
            return root / root.sum(dim=-1, keepdim=True)
        case _:
            return values


@pytest.mark.parametrize("family", sorted(set(KINDS) - {"listed, router module"}))
def test_scores_are_the_routers_own_activation_of_its_logits(models: dict[str, PreTrainedModel], family: str) -> None:
    model = model_of(models, family)
    outputs: dict[int, object] = {}
    handles = [
        block.router.register_forward_hook(lambda m, a, output, idx=block.layer_idx: outputs.update({idx: output}))
        for block in find_moe_blocks(model)
    ]
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
    for handle in handles:
        handle.remove()
    assert list(trace) == [block.layer_idx for block in find_moe_blocks(model)]
    for layer_idx in trace:
        scores = trace[layer_idx].scores
        assert scores.dtype == torch.float32
        assert scores.shape == (token_ids().numel(), EXPERTS)
        torch.testing.assert_close(scores, expected_scores(KINDS[family], outputs[layer_idx]).float())
        torch.testing.assert_close(scores.sum(dim=-1), torch.ones(len(scores)))


@pytest.mark.parametrize("family", FOLLOW_WEIGHTS)
def test_scores_of_the_selected_experts_are_proportional_to_the_weights(
    models: dict[str, PreTrainedModel], family: str
) -> None:
    model = model_of(models, family)
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
    assert len(trace) > 0
    for layer_idx in trace:
        routing = trace[layer_idx]
        assert routing.top_k_index.shape == routing.top_k_weights.shape
        assert routing.top_k_index.dtype == torch.int64
        ratio = routing.scores.gather(1, routing.top_k_index) / routing.top_k_weights
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_selection_is_what_the_experts_module_was_called_with(models: dict[str, PreTrainedModel], family: str) -> None:
    model = model_of(models, family)
    calls: list[tuple[Tensor, ...]] = []
    block = find_moe_blocks(model)[-1]
    handle = block.experts.register_forward_pre_hook(lambda m, args: calls.append(args))
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
    handle.remove()
    _, index, weights = calls[0]
    assert torch.equal(trace[block.layer_idx].top_k_index, index)
    assert torch.equal(trace[block.layer_idx].top_k_weights, weights)


def test_classes_that_compute_nothing_keep_their_share_of_the_scores(models: dict[str, PreTrainedModel]) -> None:
    model = model_of(models, "longcat_flash")
    num_zero_experts = model.config.zero_expert_num
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
    scores = trace[0].scores
    assert scores.shape[1] == EXPERTS + num_zero_experts
    torch.testing.assert_close(scores.sum(dim=-1), torch.ones(len(scores)))
    assert (scores[:, :EXPERTS].sum(dim=-1) < 1).all()


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "llama4", "listed, linear router"])
def test_scores_carry_gradient_to_the_router_of_their_layer(models: dict[str, PreTrainedModel], family: str) -> None:
    model = model_of(models, family)
    with record_routing(model) as trace:
        logits(model, token_ids())
    block = find_moe_blocks(model)[-1]
    scores = trace[block.layer_idx].scores
    weight = dict(block.router.named_parameters())[block.gate_name]
    (gradient,) = torch.autograd.grad(scores[:, 0].sum(), weight)
    assert gradient.abs().sum() > 0
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
    assert not trace[block.layer_idx].scores.requires_grad


@pytest.mark.parametrize("backward_inside", [True, False])
def test_gradient_checkpointing_changes_neither_scores_nor_gradient(
    models: dict[str, PreTrainedModel], backward_inside: bool
) -> None:
    plain, checkpointed = (copy.deepcopy(model_of(models, "qwen2_moe")).train() for _ in range(2))
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for model in (plain, checkpointed):
        with record_routing(model) as trace:
            logits(model, token_ids())
            before, memory = trace[1].scores, trace[1].top_k_index.data_ptr()
            if backward_inside:
                before[:, 2].sum().backward()
        if not backward_inside:
            before[:, 2].sum().backward()
        # Recomputation routes again; what was recorded stays.
        after = trace[1].scores
        assert torch.equal(before, after)
        assert trace[1].top_k_index.data_ptr() == memory
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_latest_pass_wins_and_leaves_nothing_of_the_pass_before(models: dict[str, PreTrainedModel]) -> None:
    model = model_of(models, "mixtral")
    short, long = token_ids()[:, :4], token_ids()
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, long)
        assert all(len(trace[layer_idx].scores) == long.numel() for layer_idx in trace)
        logits(model, short)
        assert all(len(trace[layer_idx].scores) == short.numel() for layer_idx in trace)

        def fail(*_: object) -> None:
            raise RuntimeError("stop")

        handle = find_moe_blocks(model)[1].router.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            logits(model, long)
        handle.remove()
    assert list(trace) == [0]
    assert len(trace[0].scores) == long.numel()


def test_only_the_layers_asked_for_are_recorded_and_no_hook_remains(models: dict[str, PreTrainedModel]) -> None:
    model = model_of(models, "olmoe")
    with torch.no_grad(), record_routing(model, layer_indices=[2, 0]) as trace:
        assert len(trace) == 0
        logits(model, token_ids())
    assert list(trace) == [0, 2]
    assert 1 not in trace
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_an_error_in_the_router_does_not_leave_the_spy_watching(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(model_of(models, "mixtral"))
    block = find_moe_blocks(model)[0]
    block.router.forward = lambda *_: 1 / 0
    with record_routing(model) as trace, pytest.raises(ZeroDivisionError):
        logits(model, token_ids())
    assert len(trace) == 0
    assert torch.overrides._get_current_function_mode_stack() == []


def test_bfloat16_scores_are_float32_and_close(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(model_of(models, "deepseek_v3"))
    first = find_moe_blocks(model)[0].layer_idx
    scores = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), record_routing(model.to(dtype)) as trace:
            logits(model, token_ids())
        scores.append(trace[first].scores)
    assert scores[1].dtype == torch.float32
    torch.testing.assert_close(scores[1], scores[0], atol=0.02, rtol=0)


def test_scores_of_a_compiled_block_are_those_of_the_eager_one(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(model_of(models, "deepseek_v3"))
    block = find_moe_blocks(model)[-1]
    hidden_states = torch.randn(2, 5, block.hidden_size)
    mlp = model.get_submodule(block.experts_name.rpartition(".")[0])
    with torch.no_grad(), record_routing(model) as trace:
        mlp(hidden_states)
    expected = trace[block.layer_idx].scores
    with torch.no_grad(), record_routing(model) as trace:
        torch.compile(mlp, backend="eager")(hidden_states)
    torch.testing.assert_close(trace[block.layer_idx].scores, expected)
    torch.compiler.reset()


def test_an_adapters_router_delta_is_seen(models: dict[str, PreTrainedModel]) -> None:
    base = copy.deepcopy(model_of(models, "qwen2_moe"))
    with torch.no_grad(), record_routing(base) as trace:
        logits(base, token_ids())
    before = {layer_idx: trace[layer_idx].scores for layer_idx in trace}
    model = get_peft_model(base, UOEConfig(target_experts=[(1, 3)]))
    for name, parameter in model.named_parameters():
        if "uoe_" in name and "gate" in name.split("uoe_")[0]:
            nn.init.normal_(parameter)
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
        after = {layer_idx: trace[layer_idx].scores for layer_idx in trace}
        with model.disable_adapter():
            logits(model, token_ids())
            restored = trace[1].scores
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])
    assert torch.equal(restored, before[1])


def test_a_router_that_nothing_explains_is_an_error_naming_its_layer(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(model_of(models, "mixtral"))
    router = find_moe_blocks(model)[1].router

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = nn.functional.linear(hidden_states, router.weight)
        weights, index = (router_logits**2 + 1).topk(2, dim=-1)
        return router_logits, weights, index

    router.forward = forward
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
        with pytest.raises(UnsupportedModelError, match=r"layer 1 .*proportional"):
            trace[1]


def test_a_router_without_logits_is_an_error_naming_its_layer(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(model_of(models, "mixtral"))
    router = find_moe_blocks(model)[2].router
    full = router.forward
    router.forward = lambda hidden_states: (None, *full(hidden_states)[1:])
    with torch.no_grad(), record_routing(model) as trace:
        logits(model, token_ids())
        with pytest.raises(UnsupportedModelError, match=r"layer 2 .*no logits"):
            trace[2]


def test_bad_requests_are_named(models: dict[str, PreTrainedModel]) -> None:
    model = model_of(models, "mixtral")
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\]"), record_routing(model, layer_indices=[3]):
        pass
    with pytest.raises(ValueError, match="layer_indices"), record_routing(model, layer_indices=[]):
        pass
    with record_routing(model) as trace, pytest.raises(KeyError, match="no routing of layer 0"):
        trace[0]
    config = LlamaConfig(
        vocab_size=51, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError), record_routing(LlamaForCausalLM(config)):
        pass
