"""Strength is a factor on all of an adapter's deltas: compared with base models whose weights are edited by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.tuner.conftest import hand_edited, make_config, randomise
from uoe_peft.tuner import UOELayer

Logits = Callable[..., Tensor]
LOW_RANK = {"delta_type": "low_rank", "router_delta_type": "low_rank", "r": 3, "uoe_alpha": 6}  # scaled by 2


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def adapted_with(base: PreTrainedModel, **kwargs: object) -> PeftModel:
    model = get_peft_model(copy.deepcopy(base), make_config(base, **kwargs)).eval()
    randomise(model)
    return model


@pytest.mark.parametrize(("kwargs", "scale"), [({}, 1), (LOW_RANK, 2)])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "llama4"])
def test_every_way_to_apply_an_adapter_honours_it(
    models: dict[str, PreTrainedModel],
    family: str,
    kwargs: dict[str, object],
    scale: int,
    logits: Logits,
    tmp_path: Path,
) -> None:
    base = models[family]
    model = adapted_with(base, strength=0.4, **kwargs)
    expected = logits(hand_edited(base, model, {"default": 0.4 * scale}))
    assert not torch.allclose(expected, logits(hand_edited(base, model, {"default": 1.0 * scale})), atol=1e-3)
    close(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["strength"] == 0.4
    close(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), expected)
    names = ["default", "__base__", "default"]
    close(
        logits(model, adapter_names=names),
        torch.where(torch.tensor([1, 0, 1]).bool()[:, None, None], expected, logits(base)),
    )
    model.base_model.add_weighted_adapter(["default"], [-0.5], "halved")
    model.set_adapter("halved")
    close(logits(model), logits(hand_edited(base, model, {"default": -0.2 * scale})))
    model.set_adapter("default")
    close(logits(model.merge_and_unload()), expected)


def test_it_can_be_changed_later(qwen: PreTrainedModel, logits: Logits, tmp_path: Path) -> None:
    model = adapted_with(qwen)
    model.set_strength(np.float64(0.3))
    assert model.peft_config["default"].strength == 0.3
    close(logits(model), logits(hand_edited(qwen, model, {"default": 0.3})))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(qwen), tmp_path)), logits(model))
    model.set_strength(0)
    assert torch.equal(logits(model), logits(qwen))
    for strength in (1.5, 2.0):
        model.set_strength(strength)
        close(logits(model), logits(hand_edited(qwen, model, {"default": strength})))


def test_scales_of_peft_are_relative_to_it(qwen: PreTrainedModel, logits: Logits) -> None:
    model = adapted_with(qwen, strength=0.5)
    layers = [module for module in model.modules() if isinstance(module, UOELayer)]

    def factor_is(expected: float) -> None:
        close(logits(model), logits(hand_edited(qwen, model, {"default": expected})))

    for layer in layers:
        layer.set_scale("default", 0.8)
    factor_is(0.4)
    model.set_strength(0.25)
    factor_is(0.2)
    for layer in layers:
        layer.scale_layer(3.0)
    factor_is(0.6)
    for layer in layers:
        layer.unscale_layer(2.0)
    factor_is(0.3)
    model.set_strength(0.0)
    model.set_strength(1.0)  # nothing is lost at 0
    factor_is(1.2)
    for layer in layers:
        layer.unscale_layer()
    factor_is(1.0)


def test_it_belongs_to_one_adapter(qwen: PreTrainedModel, logits: Logits) -> None:
    model = adapted_with(qwen)
    model.add_adapter("other", make_config(qwen, expert_idx=0, strength=2.0))
    randomise(model, adapter_name="other", seed=1)
    model.set_strength(0.5, "other")
    assert [model.peft_config[name].strength for name in ("default", "other")] == [1.0, 0.5]
    model.base_model.set_adapter(["default", "other"])
    close(logits(model), logits(hand_edited(qwen, model, {"default": 1.0, "other": 0.5})))
    model.delete_adapter("other")
    with pytest.raises(ValueError, match=r"other.*not found"):
        model.set_strength(1.0, "other")


def test_what_cannot_be_set_is_refused(qwen: PreTrainedModel) -> None:
    model = adapted_with(qwen)
    for strength in (-1, float("nan"), "1", True):
        with pytest.raises(ValueError, match="strength must be a finite number >= 0"):
            model.set_strength(strength)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged; call unmerge_adapter"):
        model.set_strength(0.5)
    assert model.peft_config["default"].strength == 1.0


def test_a_delta_of_scale_zero_cannot_be_set(qwen: PreTrainedModel) -> None:
    model = adapted_with(qwen, strength=0.0)
    layer = next(module for module in model.modules() if isinstance(module, UOELayer))
    key = next(iter(layer.edited_keys(["default"])))
    with pytest.raises(ValueError, match="raise its strength"):
        layer.set_delta_weight("default", *key, torch.ones_like(layer.base_slice(*key)))
