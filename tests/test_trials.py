"""What the trials of depth add to a training: weakened models, other starts, averages; and how a rate is chosen."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from uoe_peft import UOEConfig

EXPERTS = [(0, 1), (0, 3), (1, 2)]
TOKENS = torch.tensor([[3, 7, 9, 11, 20, 4, 8, 15, 16, 23, 12, 18, 1, 2, 5, 6]])


@pytest.fixture(scope="module")
def trials() -> Iterator[ModuleType]:
    """The script, which imports its neighbours as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import trials as script

        yield script


@pytest.fixture
def aids(trials: ModuleType) -> ModuleType:
    return sys.modules["trials_training"]


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=24,
        hidden_size=16,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        intermediate_size=28,
        num_experts=5,
        num_experts_per_tok=3,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    edited = get_peft_model(Qwen2MoeForCausalLM(config), UOEConfig(target_experts=EXPERTS)).eval()
    with torch.no_grad():
        for parameter in edited.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return edited


def by_hand(model: PeftModel, *, silent: set[Any], old: set[Any]) -> torch.Tensor:
    """Logits of a plain model that holds the merged weights, less those that are left out."""
    with torch.no_grad():
        base = [layer.mlp.experts.base_layer for layer in model.get_base_model().model.layers]
        kept = {pair: [w[pair[1]].clone() for w in weights(base[pair[0]])] for pair in old}
        model.merge_adapter()
        for layer, expert in silent:
            base[layer].down_proj[expert] = 0.0
        for (layer, expert), slices in kept.items():
            for weight, own in zip(weights(base[layer]), slices, strict=True):
                weight[expert] = own
        return model(input_ids=TOKENS).logits


def weights(experts: nn.Module) -> list[torch.Tensor]:
    return [experts.gate_up_proj, experts.down_proj]  # type: ignore[list-item]


class Told(random.Random):
    """Draws what it is told to."""

    def __init__(self, *draws: float) -> None:
        super().__init__(0)
        self._draws = list(draws)

    def random(self) -> float:
        return self._draws.pop(0)


@torch.no_grad()
def test_knocked_out_experts_are_silent_or_old(aids: ModuleType, model: PeftModel) -> None:
    before = model(input_ids=TOKENS).logits
    with aids.knocked_out(model, EXPERTS, Told(0.1, 0.9, 0.2, 0.4, 0.6)):  # first and last are out; one silent, one old
        found = model(input_ids=TOKENS).logits
    assert torch.equal(model(input_ids=TOKENS).logits, before)
    torch.testing.assert_close(found, by_hand(model, silent={(0, 1)}, old={(1, 2)}), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_of_several_is_always_left(aids: ModuleType, model: PeftModel) -> None:
    draw = Told(0.1, 0.1, 0.1, 0.1, 0.1)
    draw.choice = lambda pairs: pairs[1]  # type: ignore[method-assign]
    with aids.knocked_out(model, EXPERTS, draw):
        found = model(input_ids=TOKENS).logits
    torch.testing.assert_close(found, by_hand(model, silent={(0, 1), (1, 2)}, old=set()), rtol=1e-4, atol=1e-5)


def test_an_expert_begins_as_the_mean_of_the_others(aids: ModuleType, model: PeftModel) -> None:
    stacks = [layer.mlp.experts.base_layer.down_proj.detach() for layer in model.get_base_model().model.layers]
    expected = stacks[0][[0, 2, 4]].mean(0), stacks[1][[0, 1, 3, 4]].mean(0)
    aids.set_start(model, "others", seed=0)
    merged = model.merge_and_unload().model.layers
    torch.testing.assert_close(merged[0].mlp.experts.down_proj[3], expected[0])
    torch.testing.assert_close(merged[1].mlp.experts.down_proj[2], expected[1])


def test_noise_has_the_size_of_the_expert(aids: ModuleType, model: PeftModel) -> None:
    own = model.get_base_model().model.layers[1].mlp.experts.base_layer.gate_up_proj[2].detach().clone()
    aids.set_start(model, "noise", seed=0)
    found = model.merge_and_unload().model.layers[1].mlp.experts.gate_up_proj[2].detach()
    assert found.std().item() == pytest.approx(own.std().item(), rel=0.2)
    assert abs(torch.corrcoef(torch.stack([found.flatten(), own.flatten()]))[0, 1]) < 0.2


def test_averaging_ends_with_the_mean_of_the_second_half(aids: ModuleType) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    average = aids.Average([parameter], 0.5)
    for step in range(1, 7):
        parameter.data.fill_(step)
        average.on_step_end(SimpleNamespace(max_steps=6), SimpleNamespace(global_step=step), None)
    average.on_train_end(None, None, None)
    assert parameter.tolist() == [5.0, 5.0]


def test_the_rate_is_the_deepest_that_keeps_enough(trials: ModuleType) -> None:
    def run(rate: float, retain: float, relearned: float, *, trial: str = "x", seed: int = 0) -> dict[str, Any]:
        return {"trial": trial, "rate": rate, "seed": seed, "retain": [retain, 0.0], "relearned": [relearned, 1.0]}

    base = run(0.0, 0.95, 1.0, trial="base")
    runs = [base, run(1e-3, 0.9, 0.3), run(3e-3, 0.86, 0.2), run(1e-2, 0.85, 0.1), run(1e-3, 0.9, 0.0, seed=1)]
    assert trials.chosen_rate("x", runs) == 3e-3  # 0.855 is enough
    assert trials.chosen_rate("x", [base, run(1e-3, 0.4, 0.3), run(3e-3, 0.3, 0.2)]) == 1e-3
    with pytest.raises(ValueError, match="run seed 0 of 'y' first"):
        trials.chosen_rate("y", runs)
