"""Starting at a layer gives what the whole model gives, in every family."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import SUPPORTED, build, token_ids
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.exactness import fill_padding, is_exact, relative_difference, stops_exactly
from uoe_peft.moe.segments import (
    find_layers,
    record_layer_input,
    run_from_layer,
    run_until_layer,
    stop_after_layer,
)

# Configured here, this family needs tokens that mark images wherever there is a mask.
_NO_MASK = ("qwen3_omni_moe",)
# Their decoder gets no mask of its own, so that real tokens see padding on their left.
_SEES_LEFT_PADDING = ("nllb_moe", "switch_transformers", "deepseek_v4")
# No language models.
_NO_HEAD = ("diffusion_gemma", "openai_privacy_filter")


def inputs_of(model: PreTrainedModel, padding: str = "none") -> dict[str, Tensor]:
    ids = token_ids()
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, 5:] = 0
        mask = mask if padding == "right" else mask.flip(1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": ids.flip(1)} if cast(Any, model.config).is_encoder_decoder else inputs


def last_layer(model: nn.Module) -> int:
    return len(list(find_layers(model).children())) - 1


@pytest.mark.parametrize("family", SUPPORTED)
def test_starting_at_a_layer_changes_no_bit(family: str) -> None:
    model = build(family)
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(attention)
        for padding in ("none", "right", "left"):
            inputs = inputs_of(model, padding)
            if family in _NO_MASK:
                inputs = {"input_ids": inputs["input_ids"]}
            for layer_idx in {1, last_layer(model)}:
                assert relative_difference(model, inputs, layer_idx, keep_padding=True) == 0


@pytest.mark.parametrize("family", SUPPORTED)
def test_gradients_of_the_last_router_are_the_same_bits(family: str) -> None:
    model = build(family).requires_grad_(False)
    block = find_moe_blocks(model)[-1]
    weight = block.router.get_parameter(block.gate_name).requires_grad_(True)
    inputs = inputs_of(model, "right")
    if family in _NO_MASK:
        inputs = {"input_ids": inputs["input_ids"]}
    layers, layer_idx = find_layers(model), block.layer_idx
    with record_layer_input(layers, layer_idx) as recorded:
        whole = torch.autograd.grad(model(**inputs, use_cache=False)[0].square().sum(), weight)[0]
    with run_from_layer(layers, layer_idx, recorded[0]):
        part = torch.autograd.grad(model(**inputs, use_cache=False)[0].square().sum(), weight)[0]
    assert whole.count_nonzero() > 0
    assert torch.equal(part, whole)


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in _NO_MASK])
def test_what_stands_at_padding_does_not_matter(family: str) -> None:
    model = build(family)
    for padding in ("right", "left"):
        if padding == "left" and family in _SEES_LEFT_PADDING:
            assert not is_exact(model, inputs_of(model, padding), 1)
            continue
        assert is_exact(model, inputs_of(model, padding), 1)


@pytest.mark.parametrize("family", SUPPORTED)
@torch.no_grad()
def test_the_state_decides_what_the_model_says(family: str) -> None:
    """Otherwise equal results would say nothing about the state."""
    model = build(family)
    inputs, layer_idx = inputs_of(model), last_layer(model)
    if family in _NO_MASK:
        inputs = {"input_ids": inputs["input_ids"]}
    state = run_until_layer(model, layer_idx, inputs)
    hidden = state if isinstance(state, Tensor) else state[0]
    other = hidden + torch.randn_like(hidden)
    whole = model(**inputs, use_cache=False)[0]
    with run_from_layer(find_layers(model), layer_idx, other if isinstance(state, Tensor) else (other, *state[1:])):
        part = model(**inputs, use_cache=False)[0]
    assert (part - whole).std() > 0.05 * whole.std()


@pytest.fixture
def model() -> PreTrainedModel:
    return build("qwen2_moe")


@torch.no_grad()
def test_running_until_a_layer_gives_what_enters_it(model: PreTrainedModel) -> None:
    entered: list[Tensor] = []
    layers = cast(Any, model).model.layers
    handle = layers[2].register_forward_pre_hook(lambda layer, args: entered.append(args[0]))
    model(**inputs_of(model))
    handle.remove()
    called: list[int] = []
    for index in (2,):
        layers[index].register_forward_pre_hook(lambda layer, args, index=index: called.append(index))
    cast(Any, model).lm_head.register_forward_pre_hook(lambda layer, args: called.append(-1))
    assert torch.equal(cast(Tensor, run_until_layer(model, 2, inputs_of(model))), entered[0])
    assert called == []


@torch.no_grad()
def test_skipped_layers_are_not_run(model: PreTrainedModel) -> None:
    inputs, called = inputs_of(model), []
    state = run_until_layer(model, 2, inputs)
    for index, layer in enumerate(cast(Any, model).model.layers):
        layer.register_forward_pre_hook(lambda layer, args, index=index: called.append(index))
    with run_from_layer(find_layers(model), 2, state):
        model(**inputs)
    assert called == [2]


def test_the_gradient_is_the_same(model: PreTrainedModel) -> None:
    inputs = inputs_of(model)
    weight = cast(Any, model).model.layers[2].mlp.gate.weight
    whole = torch.autograd.grad(model(**inputs).logits.square().sum(), weight)[0]
    with run_from_layer(find_layers(model), 2, run_until_layer(model, 2, inputs)):
        logits = model(**inputs).logits
    assert torch.equal(torch.autograd.grad(logits.square().sum(), weight)[0], whole)


def test_recomputing_after_the_context_has_ended_sees_the_state(model: PreTrainedModel) -> None:
    inputs = inputs_of(model)
    weight = cast(Any, model).model.layers[2].mlp.gate.weight
    whole = torch.autograd.grad(model(**inputs).logits.square().sum(), weight)[0]
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    with run_from_layer(find_layers(model), 2, run_until_layer(model, 2, inputs)):
        logits = model(**inputs).logits
    assert torch.equal(torch.autograd.grad(logits.square().sum(), weight)[0], whole)


def test_nothing_is_left_behind_even_after_an_error(model: PreTrainedModel) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    layers, inputs = find_layers(model), inputs_of(model)
    state = run_until_layer(model, 2, inputs)
    with pytest.raises(RuntimeError, match="stop"), run_from_layer(layers, 2, state):
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"), record_layer_input(layers, 2):
        raise RuntimeError("stop")
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layers.modules())


def test_stand_ins_have_the_attributes_of_their_layers_and_no_parameters(model: PreTrainedModel) -> None:
    layers = cast(Any, model).model.layers
    layers[0].note = "an attribute that the model might look up"
    above = {id(p) for p in layers[2].parameters()}
    with run_from_layer(layers, 2, torch.zeros(1)):
        assert layers[0].note == "an attribute that the model might look up"
        assert layers[0].self_attn.head_dim == layers[2].self_attn.head_dim
        assert {id(p) for p in layers.parameters()} == above


def test_a_model_that_needs_more_than_the_state_is_not_exact(model: PreTrainedModel) -> None:
    """A side effect of a skipped layer that a later one reads."""
    layers, seen = cast(Any, model).model.layers, {}
    layers[0].register_forward_pre_hook(lambda layer, args: seen.update(token=args[0].mean()))
    layers[2].register_forward_hook(lambda layer, args, output: output + seen.pop("token", 1.0))
    assert not is_exact(model, inputs_of(model), 1)


def test_a_model_that_fails_without_its_layers_is_not_exact(model: PreTrainedModel) -> None:
    layers, seen = cast(Any, model).model.layers, {}
    layers[0].register_forward_pre_hook(lambda layer, args: seen.update(token=args[0].mean()))
    layers[2].register_forward_hook(lambda layer, args, output: output + seen.pop("token"))
    assert relative_difference(model, inputs_of(model), 1) == torch.inf


@pytest.mark.parametrize("layer_idx", [-1, 0, 3])
def test_a_layer_without_layers_below_is_refused(model: PreTrainedModel, layer_idx: int) -> None:
    with pytest.raises(ValueError, match=f"3 decoder layers, got layer_idx={layer_idx}; use 1 to 2"):
        run_until_layer(model, layer_idx, inputs_of(model))


@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0]])
def test_padding_gets_the_last_real_state(mask: list[int]) -> None:
    hidden = torch.arange(5.0).view(1, 5, 1).expand(2, 5, 3)
    filled = fill_padding(hidden, torch.tensor([mask, [1] * 5]))
    last = max(position for position, kept in enumerate(mask) if kept)
    assert filled[0, :, 0].tolist() == [position if kept else last for position, kept in enumerate(mask)]
    assert torch.equal(filled[1], hidden[1])


# ---- Ending at a layer ----


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in _NO_HEAD])
def test_a_layer_returns_the_same_bits_where_nothing_above_it_runs(family: str) -> None:
    model = build(family)
    inputs = inputs_of(model, "right")
    if family in _NO_MASK:
        inputs = {"input_ids": inputs["input_ids"]}
    assert all(stops_exactly(model, inputs, layer_idx) for layer_idx in range(last_layer(model) + 1))


def test_nothing_above_the_layer_is_run(model: PreTrainedModel) -> None:
    called = []
    for index, layer in enumerate(cast(Any, model).model.layers):
        layer.register_forward_pre_hook(lambda layer, args, index=index: called.append(index))
    with stop_after_layer(model, 1):
        logits = model(**inputs_of(model)).logits
    assert called == [0, 1]
    assert logits.numel() == 0


def test_a_model_may_start_at_one_layer_and_end_at_another(model: PreTrainedModel) -> None:
    inputs, outputs = inputs_of(model), []
    layer = cast(Any, model).model.layers[1]
    layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    model(**inputs)
    state = run_until_layer(model, 1, inputs)
    with stop_after_layer(model, 1), run_from_layer(find_layers(model), 1, state):
        model(**inputs)
    assert torch.equal(outputs[0], outputs[1])
    gradients = [torch.autograd.grad(o.square().sum(), layer.mlp.gate.weight)[0] for o in outputs]
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_after_ending_at_a_layer_the_model_is_whole_again(model: PreTrainedModel) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="stop"), stop_after_layer(model, 0):
        raise RuntimeError("stop")
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="3 decoder layers, got layer_idx=3"), stop_after_layer(model, 3):
        pass


def test_a_model_that_reads_what_layers_above_do_does_not_stop_exactly(model: PreTrainedModel) -> None:
    layers = cast(Any, model).model.layers
    calls: list[int] = []
    layers[2].register_forward_pre_hook(lambda layer, args: calls.append(1))
    layers[1].register_forward_hook(lambda layer, args, output: output + len(calls))
    assert not stops_exactly(model, inputs_of(model), 1)


def test_layers_that_were_replaced_are_found_again(model: PreTrainedModel) -> None:
    cast(Any, model).model.layers = nn.ModuleList(find_layers(model).children())
    assert find_layers(model) is cast(Any, model).model.layers
