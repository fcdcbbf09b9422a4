"""A file changes nothing but the adapter that it is loaded into, and that as a whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.tuner.conftest import base_state, make_config, randomise
from uoe_peft.tuner import UOEConfig, UOELayer
from uoe_peft.tuner.loading import withdraw

Logits = Callable[..., Tensor]

NORM = "base_model.model.model.norm.weight"


def delta_of(state: dict[str, Tensor]) -> str:
    return next(name for name in state if name.endswith("uoe_delta.down_proj"))


def with_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, NORM: torch.zeros(32)}


def with_base_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    name = delta_of(state).replace("uoe_delta.", "base_layer.")
    return {**state, name: torch.zeros(6, 32, 24)}


def with_nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, delta_of(state): torch.full_like(state[delta_of(state)], torch.nan)}


def shortened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, delta_of(state): state[delta_of(state)][:, :-1].contiguous()}


def lengthened(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, delta_of(state): torch.cat([state[delta_of(state)]] * 2, dim=1)}


def without_delta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != delta_of(state)}


BAD = [
    (with_norm, r"unexpected \['.*model.norm.weight'\]; nothing was loaded"),
    (with_base_experts, r"unexpected \['.*base_layer.down_proj'\]"),
    (with_nan, r"NaN or infinite in \['.*uoe_delta.*down_proj'\]"),
    (shortened, r"size mismatch for .*down_proj"),
    (lengthened, r"size mismatch for .*down_proj"),
    (without_delta, r"missing \['.*down_proj'\]"),
]


@pytest.fixture
def folder(qwen: PreTrainedModel, tmp_path: Path) -> Path:
    model = get_peft_model(copy.deepcopy(qwen), make_config(qwen))
    randomise(model, seed=3)
    model.save_pretrained(tmp_path)
    return tmp_path


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_file_is_refused_and_the_base_is_as_before(
    qwen: PreTrainedModel, folder: Path, logits: Logits, change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    before, said = base_state(qwen), logits(qwen)
    spoil(folder, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(qwen, folder)
    assert torch.equal(logits(qwen), said)
    assert not any(isinstance(module, UOELayer) for module in qwen.modules())
    after = base_state(qwen)
    assert before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_failed_load_adapter_registers_nothing(
    qwen: PreTrainedModel, folder: Path, logits: Logits, change: Callable[..., dict[str, Tensor]], message: str
) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    said, good = logits(model), load_file(folder / "adapter_model.safetensors")
    spoil(folder, change)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "second")
    assert set(model.peft_config) == {"default"} and model.active_adapters == ["default"]
    assert all(p.requires_grad == (".uoe_" in name) for name, p in model.named_parameters())
    assert torch.equal(logits(model), said)
    save_file(good, folder / "adapter_model.safetensors")
    model.load_adapter(folder, "second")
    assert set(model.peft_config) == {"default", "second"}


def test_an_adapter_that_was_there_stays_when_a_load_into_it_fails(
    qwen: PreTrainedModel, folder: Path, logits: Logits
) -> None:
    model = PeftModel.from_pretrained(qwen, folder)
    said = logits(model)
    spoil(folder, with_nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.load_adapter(folder, "default")
    assert set(model.peft_config) == {"default"} and torch.equal(logits(model), said)


def test_transformers_own_loading_checks_no_file(qwen: PreTrainedModel, folder: Path) -> None:
    """`model.load_adapter` of transformers hands the file to no method of PEFT: `UOEModel` says which loading to use.

    Where this fails, it has become safe, and what `UOEModel` says of it is to be taken back.
    """
    spoil(folder, lambda state: with_nan(with_norm(state)))
    qwen.load_adapter(str(folder))
    assert torch.equal(qwen.model.norm.weight, torch.zeros(32))
    assert any(p.isnan().any() for name, p in qwen.named_parameters() if ".uoe_" in name)


def test_modules_that_an_adapter_saves_in_full_are_its_own(
    qwen: PreTrainedModel, logits: Logits, tmp_path: Path
) -> None:
    model = get_peft_model(copy.deepcopy(qwen), make_config(qwen, modules_to_save=["lm_head"])).eval()
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(qwen, tmp_path)), logits(model))


def test_the_callers_config_is_not_changed(qwen: PreTrainedModel) -> None:
    config = make_config(qwen)
    given = copy.deepcopy(config)
    model = get_peft_model(qwen, config)
    model.add_adapter("second", config)
    assert (config.target_modules, config.base_experts) == (None, None) == (given.target_modules, given.base_experts)
    assert model.peft_config["default"].base_experts and model.peft_config["second"].target_modules
    model.set_strength(0.5, "second")
    assert config.strength == model.peft_config["default"].strength == 1.0


def test_withdrawing_an_active_adapter_makes_no_other_active(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen))
    model.add_adapter("second", make_config(qwen))
    model.set_adapter("second")
    layers = [module for module in model.modules() if isinstance(module, UOELayer)]
    withdraw(model, "".join("second"))  # an equal string, but another object
    assert layers and all(layer.active_adapters == [] for layer in layers)
    assert all(list(layer.target_indices) == ["default"] for layer in layers)
    withdraw(model, "default")
    assert not any(isinstance(module, UOELayer) for module in model.modules())


@pytest.mark.parametrize("name", ["another", "second"])
def test_an_injection_that_fails_leaves_the_active_adapter_active(
    qwen: PreTrainedModel, logits: Logits, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    said = logits(model)

    def fail(layer: UOELayer, adapter_name: str, init_weights: bool | str) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(UOELayer, "reset_uoe_parameters", fail)
        model.base_model.add_weighted_adapter(["default"], [1.0], name)
    layers = [module for module in model.modules() if isinstance(module, UOELayer)]
    assert layers and all(layer.active_adapters == ["default"] for layer in layers)
    assert set(model.peft_config) == {"default"} and torch.equal(logits(model), said)


def test_an_injection_that_fails_leaves_no_wrapper(
    qwen: PreTrainedModel, logits: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = logits(qwen)
    calls: list[str] = []

    def fail(layer: UOELayer, adapter_name: str, init_weights: bool | str) -> None:
        calls.append(adapter_name)
        if len(calls) == 2:
            raise MemoryError

    monkeypatch.setattr(UOELayer, "reset_uoe_parameters", fail)
    with pytest.raises(MemoryError):
        get_peft_model(qwen, UOEConfig(target_experts=make_config(qwen).target_experts))
    assert len(calls) == 2 and not any(isinstance(module, UOELayer) for module in qwen.modules())
    assert torch.equal(logits(qwen), said)
