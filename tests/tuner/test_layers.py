"""What a fresh layer holds, and where: values, dtypes, devices; and what passes through a router that has no delta."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.tuner.conftest import make_config, randomise, stored_deltas
from uoe_peft.moe import find_moe_blocks, unwrap
from uoe_peft.tuner import UOEExpertsLayer, UOELayer, UOERouterLayer

Logits = Callable[..., Tensor]


def layers(model: PeftModel) -> list[UOELayer]:
    return [module for module in model.modules() if isinstance(module, UOELayer)]


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


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 7 / 3), (True, 7 / 3**0.5)])
def test_low_rank_deltas_are_scaled_by_alpha_over_the_rank_or_its_root(
    qwen: PreTrainedModel, use_rslora: bool, scale: float
) -> None:
    config = make_config(qwen, delta_type="low_rank", r=3, uoe_alpha=7, use_rslora=use_rslora, init_weights=False)
    model = get_peft_model(qwen, config)
    for layer in layers(model):
        for projection, index, delta in stored_deltas(layer, "default"):
            expected = delta * (scale if "default" in layer.uoe_A else 1)
            torch.testing.assert_close(layer.get_delta_weight("default", projection, index), expected)


@pytest.mark.parametrize("scale", [2.5, -2.0])
@pytest.mark.parametrize("delta_type", ["full", "low_rank"])
def test_a_delta_that_was_set_is_the_one_that_is_applied(qwen: PreTrainedModel, delta_type: str, scale: float) -> None:
    config = make_config(qwen, delta_type=delta_type, router_delta_type=delta_type, r=40, uoe_alpha=20)
    for layer in layers(get_peft_model(qwen, config)):
        layer.set_scale("default", scale)
        for projection, index in layer.edited_keys(["default"]):
            delta = torch.randn(layer.slice_shape(projection, index))
            layer.set_delta_weight("default", projection, index, delta)
            found = layer.get_delta_weight("default", projection, index)
            torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)


def test_adapters_of_other_layers_edit_nothing_here(qwen: PreTrainedModel) -> None:
    for layer in layers(get_peft_model(qwen, make_config(qwen))):
        keys = layer.edited_keys(["elsewhere", "default"])
        assert keys and all(names == ["default"] for names in keys.values())


def test_what_a_wrapper_lacks_is_the_wrapped_modules(qwen: PreTrainedModel) -> None:
    experts = find_moe_blocks(get_peft_model(qwen, make_config(qwen)))[-1].experts
    assert experts.act_fn is experts.get_base_layer().act_fn  # before "base_layer" in the alphabet
    assert experts.num_experts == 6
    with pytest.raises(AttributeError, match="no attribute 'base_layer'"):  # as while it is being unpickled
        _ = UOEExpertsLayer.__new__(UOEExpertsLayer).base_layer


def test_an_adapter_is_of_its_bases_dtype_unless_peft_casts_it(qwen: PreTrainedModel) -> None:
    qwen.to(torch.bfloat16)
    model = get_peft_model(qwen, make_config(qwen), autocast_adapter_dtype=False)
    assert {p.dtype for p in deltas(model).values()} == {torch.bfloat16}


def test_an_adapter_is_put_where_it_is_told_whatever_its_base_is(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    for layer in layers(model):
        layer.get_base_layer().to("meta")
        layer._move_adapter_to_device_of_base_layer("default", torch.device("cpu"))
    assert {p.device.type for p in deltas(model).values()} == {"cpu"}


def test_what_is_not_in_memory_yet_keeps_nothing_else_from_moving(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    layer = next(layer for layer in layers(model) if isinstance(layer, UOEExpertsLayer))
    stored = layer.uoe_delta["default"]
    (name, first), (_, second) = stored.items()
    stored[name] = torch.nn.Parameter(torch.empty_like(first, device="meta"))
    layer.get_base_layer().to(torch.float64)
    layer._move_adapter_to_device_of_base_layer("default")
    assert stored[name].is_meta
    assert second.dtype == torch.float64


def test_a_routers_shape_is_that_of_its_plain_matrix(qwen: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised matrix is stored in another shape than it has."""
    layer = next(x for x in layers(get_peft_model(qwen, make_config(qwen))) if isinstance(x, UOERouterLayer))
    assert layer.slice_shape("gate", 0) == (6, 32)
    monkeypatch.setattr(layer, "base_slice", lambda projection, index: torch.empty(3, 5))
    assert layer.slice_shape("gate", 0) == (3, 5)


def test_a_traced_router_says_what_the_router_says(
    qwen: PreTrainedModel, input_ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a graph is traced it is called in another way, which must see the edited matrix, too."""
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    router = next(layer for layer in layers(model) if isinstance(layer, UOERouterLayer))
    states = torch.randn(7, 32)
    plain = router.get_base_layer()(states)
    expected = router(states)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for found, own, unedited in zip(router(states), expected, plain, strict=True):
        torch.testing.assert_close(found, own)
        if found.is_floating_point():
            assert not torch.allclose(found, unedited)
    with model.disable_adapter():
        for found, unedited in zip(router(states), plain, strict=True):
            assert torch.equal(found, unedited)


def test_a_router_that_others_train_is_called_itself(qwen: PreTrainedModel, input_ids: Tensor) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    matrix = unwrap(find_moe_blocks(model)[-1].router).weight.requires_grad_(True)
    with model.disable_adapter():
        matrix.requires_grad_(True)
        model(input_ids).logits.square().mean().backward()
    assert matrix.grad is not None and matrix.grad.any()
