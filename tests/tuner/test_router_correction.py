"""A correction of a router above the edited layer is part of the adapter in everything but training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tuner.conftest import base_state, randomise
from uoe_peft.moe import find_moe_blocks, unwrap
from uoe_peft.tuner import (
    UOEConfig,
    UOELayer,
    UOEModel,
    UOERouterLayer,
    add_router_correction,
    correctable_blocks,
    remove_router_correction,
)

Logits = Callable[..., Tensor]


def tuner(model: PeftModel) -> UOEModel:
    return cast(UOEModel, model.base_model)


def low_config(model: nn.Module, **kwargs: object) -> UOEConfig:
    """A config for one expert of the model's first MoE layer."""
    layer_idx = find_moe_blocks(model)[0].layer_idx
    return UOEConfig(**{"target_experts": [(layer_idx, 1)], "r": 3, **kwargs})


def last_layer(model: nn.Module) -> int:
    return find_moe_blocks(model)[-1].layer_idx


def last_router(model: nn.Module) -> nn.Module:
    return find_moe_blocks(model)[-1].router


def random_delta(model: nn.Module, *, seed: int = 3) -> Tensor:
    block = find_moe_blocks(model)[-1]
    shape = unwrap(block.router).get_parameter(block.gate_name).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.fixture
def corrected(base: PreTrainedModel, delta_type: str) -> PeftModel:
    """A random adapter of the first MoE layer, with a random correction of the last one's router."""
    delta = random_delta(base)
    model = get_peft_model(base, low_config(base, delta_type=delta_type, router_delta_type=delta_type))
    randomise(model)
    add_router_correction(tuner(model), "default", last_layer(base), delta)
    return model.eval()


def test_a_correction_is_the_delta_added_to_the_router(
    corrected: PeftModel, models: dict[str, PreTrainedModel], family: str, logits: Logits
) -> None:
    plain = copy.deepcopy(models[family])
    block = find_moe_blocks(plain)[-1]
    delta = random_delta(plain)
    config = low_config(plain, **{k: corrected.peft_config["default"].to_dict()[k] for k in ("delta_type",)})
    config.router_delta_type = config.delta_type
    with torch.no_grad():
        block.router.get_parameter(block.gate_name).add_(delta)
    model = get_peft_model(plain, config)
    randomise(model)
    assert torch.equal(logits(model.eval()), logits(corrected))


def test_switching_off_gives_the_base_back(
    corrected: PeftModel, models: dict[str, PreTrainedModel], family: str, logits: Logits
) -> None:
    before = logits(models[family])
    with corrected.disable_adapter():
        assert torch.equal(logits(corrected), before)
    assert not torch.equal(logits(corrected), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_writes_it_and_unmerging_restores_every_bit(
    corrected: PeftModel, models: dict[str, PreTrainedModel], family: str, logits: Logits, dtype: torch.dtype
) -> None:
    corrected.to(dtype)
    before, unmerged = base_state(corrected), logits(corrected)
    for _ in range(3):
        corrected.merge_adapter()
        gate = find_moe_blocks(corrected)[-1].gate_name
        router = cast(UOELayer, last_router(corrected)).get_base_layer().get_parameter(gate)
        expected = dict(last_router(models[family]).named_parameters())[gate].to(dtype).float()
        delta = random_delta(models[family]).to(dtype).float()
        assert torch.equal(router, (expected + delta).to(dtype))
        corrected.unmerge_adapter()
    after = base_state(corrected)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(corrected), unmerged)


def test_merge_and_unload_holds_it(corrected: PeftModel, logits: Logits) -> None:
    unmerged = logits(corrected)
    merged = corrected.merge_and_unload(progressbar=False)
    assert not any(isinstance(module, UOELayer) for module in merged.modules())
    torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_give_equal_logits(
    corrected: PeftModel,
    models: dict[str, PreTrainedModel],
    family: str,
    logits: Logits,
    tmp_path: Path,
    dtype: torch.dtype,
    low_cpu_mem_usage: bool,
) -> None:
    corrected.to(dtype)
    corrected.save_pretrained(tmp_path)
    base = copy.deepcopy(models[family]).to(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(corrected))
    assert loaded.peft_config["default"].corrected_router_layers == [last_layer(base)]


def test_transformers_own_loading_holds_it(qwen: PreTrainedModel, logits: Logits, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(qwen), low_config(qwen)).eval()
    randomise(model)
    add_router_correction(tuner(model), "default", 2, random_delta(qwen))
    model.save_pretrained(tmp_path)
    qwen.load_adapter(str(tmp_path))
    assert torch.equal(logits(qwen), logits(model))


def test_it_is_never_trainable(
    corrected: PeftModel, models: dict[str, PreTrainedModel], family: str, input_ids: Tensor, tmp_path: Path
) -> None:
    corrected.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(models[family]), tmp_path, is_trainable=True)
    for model in (corrected, loaded):
        model.set_adapter("default")
        model.train()
        path = f".layers.{last_layer(model)}."
        named = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert named and not [name for name in named if path in name]
        before = {name: b.clone() for name, b in model.named_buffers() if ".uoe_delta." in name}
        assert len(before) == 1
        model(input_ids=input_ids).logits.square().mean().backward()
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        assert all(torch.equal(dict(model.named_buffers())[name], buffer) for name, buffer in before.items())


def test_an_adapter_that_knows_no_corrections_loads(qwen: PreTrainedModel, logits: Logits, tmp_path: Path) -> None:
    model = get_peft_model(copy.deepcopy(qwen), low_config(qwen)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("corrected_router_layers") is None
    path.write_text(json.dumps(fields))
    assert torch.equal(logits(PeftModel.from_pretrained(qwen, tmp_path)), logits(model))


def test_a_config_that_names_layers_begins_without_effect(qwen: PreTrainedModel, logits: Logits) -> None:
    before = logits(qwen)
    model = get_peft_model(qwen, low_config(qwen, corrected_router_layers=[2, 1])).eval()
    assert model.peft_config["default"].corrected_router_layers == [1, 2]
    assert sum(isinstance(module, UOERouterLayer) for module in model.modules()) == 3
    assert torch.equal(logits(model), before)


def test_it_is_full_where_routers_are_low_rank(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, low_config(qwen, delta_type="low_rank", router_delta_type="low_rank"))
    delta = random_delta(qwen)
    add_router_correction(tuner(model), "default", 2, delta)
    layer = cast(UOELayer, last_router(model))
    assert torch.equal(layer.get_delta_weight("default", "weight", 0), delta)
    assert torch.linalg.matrix_rank(delta) > 3


def test_removing_it_leaves_no_trace(qwen: PreTrainedModel, logits: Logits) -> None:
    model = get_peft_model(qwen, low_config(qwen)).eval()
    randomise(model)
    before, state, config = logits(model), model.state_dict(), model.peft_config["default"].to_dict()
    add_router_correction(tuner(model), "default", 2, random_delta(qwen))
    add_router_correction(tuner(model), "default", 1, random_delta(qwen))
    assert not torch.equal(logits(model), before)
    for layer_idx in (1, 2):
        remove_router_correction(tuner(model), "default", layer_idx)
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == state.keys()
    assert model.peft_config["default"].to_dict() == config


def test_each_adapter_has_its_own(qwen: PreTrainedModel, logits: Logits) -> None:
    model = get_peft_model(qwen, low_config(qwen)).eval()
    randomise(model)
    model.add_adapter("other", low_config(qwen, target_experts=[(1, 3)]))
    randomise(model, adapter_name="other", seed=1)
    first = logits(model)
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter("default")
    add_router_correction(tuner(model), "other", 2, random_delta(qwen))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert not torch.equal(logits(model), other)
    model.set_adapter("default")
    add_router_correction(tuner(model), "default", 2, random_delta(qwen, seed=4))
    both = logits(model)
    assert not torch.equal(both, first)
    remove_router_correction(tuner(model), "default", 2)  # the active adapter's, beside another's
    assert torch.equal(logits(model), first)
    add_router_correction(tuner(model), "default", 2, random_delta(qwen, seed=4))
    remove_router_correction(tuner(model), "other", 2)
    assert torch.equal(logits(model), both)
    model.set_adapter("other")
    assert torch.equal(logits(model), other)


def test_weighted_sums_hold_corrections(qwen: PreTrainedModel, logits: Logits) -> None:
    # The first corrects what the second trains: the sum must hold both, though routers are of rank 1.
    low_rank = {"delta_type": "low_rank", "router_delta_type": "low_rank", "r": 1}
    model = get_peft_model(qwen, low_config(qwen, **low_rank)).eval()
    randomise(model)
    model.add_adapter("other", low_config(qwen, target_experts=[(2, 3)], **low_rank))
    randomise(model, adapter_name="other", seed=1)
    for layer_idx in (1, 2):
        add_router_correction(tuner(model), "default", layer_idx, random_delta(qwen))
    tuner(model).set_adapter(["default", "other"])
    tuner(model).add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert model.peft_config["sum"].corrected_router_layers == [1]
    expected = logits(model)
    tuner(model).set_adapter("sum")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_the_routers_that_may_be_corrected(qwen: PreTrainedModel) -> None:
    def layers(**kwargs: object) -> list[int]:
        model = get_peft_model(copy.deepcopy(qwen), low_config(qwen, **kwargs))
        return [block.layer_idx for block in correctable_blocks(tuner(model), "default")]

    assert layers() == [1, 2]
    assert layers(target_experts=[(1, 0)]) == [2]
    assert layers(target_experts=[(2, 0)]) == []
    assert layers(target_experts=[(0, 0), (1, 3)]) == [2]
    assert layers(target_experts=[(0, 0), (1, 3)], train_router=False) == [1, 2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([7], "layer 7 of Qwen2MoeForCausalLM has no Mixture-of-Experts block, got layer_idx=7 in corrected_router"),
        ([0], "the router of layer 0 is trained with its target expert"),
        ([1, 1], r"must be distinct decoder layers >= 0, got \[1, 1\]"),
        ([-1], r"must be distinct decoder layers >= 0, got \[-1\]"),
    ],
)
def test_layers_that_cannot_be_corrected_are_refused(qwen: PreTrainedModel, layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(qwen, low_config(qwen, corrected_router_layers=layers))


def test_bad_corrections_are_refused(qwen: PreTrainedModel) -> None:
    delta = random_delta(qwen)
    model = get_peft_model(qwen, low_config(qwen))
    with pytest.raises(ValueError, match=r"delta must have the shape \(6, 32\) .* got \(32, 6\)"):
        add_router_correction(tuner(model), "default", 2, delta.T)
    with pytest.raises(ValueError, match=r"'default' corrects the routers of layers \[\], got 2"):
        remove_router_correction(tuner(model), "default", 2)
    add_router_correction(tuner(model), "default", 2, delta)
    with pytest.raises(ValueError, match="has a correction of layer 2 already"):
        add_router_correction(tuner(model), "default", 2, delta)
