"""The scale of an adapter against a score whose dependence on it is known."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Qwen2MoeForCausalLM

from uoe_peft.evaluation import calibrate_scale
from uoe_peft.tuner import UOEConfig


def score_of(
    forget: Callable[[float], float], retain: Callable[[float], float]
) -> Callable[[nn.Module], dict[str, float]]:
    def score(model: nn.Module) -> dict[str, float]:
        layer = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict))
        scale = layer.scaling["default"] / 1.0  # type: ignore[index, operator, union-attr]
        scale = float(scale) / START
        return {"forget_rouge_l_recall": forget(scale), "retain_rouge_l_recall": retain(scale), "retain_other": 0.5}

    return score


START = 8 / 3  # LoRA's alpha / r of the fixture


def test_the_greatest_scale_that_keeps_its_share(scrambled: PeftModel) -> None:
    found = calibrate_scale(scrambled, score_of(lambda s: 1 - s, lambda s: 0.8 - 0.4 * s), retain_share=0.75)
    assert found.scale == pytest.approx(0.5)  # 0.8 - 0.4 s = 0.75 · 0.8
    assert found.limit == pytest.approx(0.6)
    assert (found.goal, found.metric, found.monotone) == ("retain", "retain_rouge_l_recall", True)
    for point in found.curve:
        assert point["forget_rouge_l_recall"] == pytest.approx(1 - point["scale"])
    layer = next(module for module in scrambled.modules() if isinstance(getattr(module, "scaling", None), dict))
    assert layer.scaling == {"default": START}


def test_an_adapter_of_this_package_is_tried_at_every_scale_anew(taught_model: Qwen2MoeForCausalLM) -> None:
    model = get_peft_model(deepcopy(taught_model), UOEConfig(target_experts=[(1, 2)], strength=START))
    found = calibrate_scale(model, score_of(lambda s: 1 - s, lambda s: 0.8 - 0.4 * s), retain_share=0.75)
    assert found.scale == pytest.approx(0.5)
    assert len(found.curve) > 3
    for point in found.curve:
        assert point["forget_rouge_l_recall"] == pytest.approx(1 - point["scale"])


def test_the_least_scale_that_forgets_enough(scrambled: PeftModel) -> None:
    score = score_of(lambda s: 1 - s, lambda s: 1.0)
    found = calibrate_scale(scrambled, score, forget_limit=0.3, tolerance=1 / 64)
    assert found.scale is not None
    assert 0.7 <= found.scale <= 0.7 + 1 / 64
    assert calibrate_scale(scrambled, score, forget_limit=-1.0).scale is None


def test_a_goal_is_needed_and_a_measure_for_it(scrambled: PeftModel) -> None:
    score = score_of(lambda s: s, lambda s: s)
    with pytest.raises(ValueError, match="either retain_share or forget_limit, got None and None"):
        calibrate_scale(scrambled, score)
    with pytest.raises(ValueError, match=r"retain_share must be in \(0, 1\], got 95"):
        calibrate_scale(scrambled, score, retain_share=95)
    with pytest.raises(ValueError, match="no other of the forget set"):
        calibrate_scale(scrambled, score, forget_limit=0.1, metric="other")
