"""Experts that are left out without training, against models that were built without them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BETAS = {0: 0.5, 1: 0.5}


@pytest.fixture(scope="module")
def controls() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import controls as script

        yield script


def new_model(*, num_experts: int = 5, top_k: int = 2, norm: bool = False) -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=20,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm,
        initializer_range=0.3,
    )
    return Qwen2MoeForCausalLM(config).eval()


IDS = torch.arange(28).reshape(4, 7)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("norm", [False, True])
def test_to_route_around_an_expert_is_to_have_a_model_without_it(controls: ModuleType, norm: bool) -> None:
    model = new_model(norm=norm)
    smaller, kept = new_model(num_experts=4, norm=norm), [0, 1, 3, 4]
    state = {
        name: value[kept] if ".mlp.experts." in name or name.endswith("mlp.gate.weight") else value
        for name, value in model.state_dict().items()
    }
    smaller.load_state_dict(state)
    with controls.controlled(model, [(0, 2), (1, 2)], "route around", betas={}):
        around = logits(model)
    torch.testing.assert_close(around, logits(smaller))
    assert not torch.allclose(around, logits(model))


def test_an_expert_that_contributes_zero_is_one_whose_output_weights_are_zero(controls: ModuleType) -> None:
    model = new_model()
    emptied = deepcopy(model)
    emptied.model.layers[1].mlp.experts.down_proj.data[3] = 0
    with controls.controlled(model, [(1, 3)], "zero", betas={}):
        torch.testing.assert_close(logits(model), logits(emptied))


@pytest.mark.parametrize("norm", [False, True])
def test_to_skip_every_second_expert_is_to_select_one(controls: ModuleType, norm: bool) -> None:
    model = new_model(norm=norm)
    single = new_model(top_k=1, norm=norm)
    single.load_state_dict(model.state_dict())
    with controls.controlled(model, None, "skip", betas={0: 1.01, 1: 1.01}):
        torch.testing.assert_close(logits(model), logits(single))
    before = logits(model)
    with controls.controlled(model, None, "skip", betas={0: 0.0, 1: 0.0}):
        torch.testing.assert_close(logits(model), before)


def test_named_experts_are_skipped_where_they_come_second_and_are_weak(controls: ModuleType) -> None:
    weights = torch.tensor([[0.6, 0.1], [0.5, 0.4], [0.6, 0.2], [0.7, 0.1]])
    index = torch.tensor([[0, 2], [1, 2], [2, 3], [4, 1]])
    hook = controls.skipping([2, 1], 0.5)
    _, kept, selected = hook(SimpleNamespace(norm_topk_prob=False), (), (weights, weights, index))
    assert kept.tolist() == torch.tensor([[0.6, 0.0], [0.5, 0.4], [0.6, 0.2], [0.7, 0.0]]).tolist()
    assert torch.equal(selected, index)
    assert weights[0, 1] == torch.tensor(0.1)  # what the router returned is left as it is


@pytest.mark.parametrize(
    ("pairs", "control"), [([(0, 2)], "zero"), ([(0, 2)], "route around"), (None, "skip"), ([], "none")]
)
def test_afterwards_the_model_is_as_it_was(controls: ModuleType, pairs: Any, control: str) -> None:
    model = new_model()
    before = logits(model)
    with pytest.raises(KeyError, match="on the way"), controls.controlled(model, pairs, control, betas=BETAS):
        assert torch.equal(logits(model), before) == (control == "none")
        raise KeyError("on the way")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("pairs", "control"), [(None, "zero"), ([(0, 1)], "prune")])
def test_what_is_no_control_is_refused(controls: ModuleType, pairs: Any, control: str) -> None:
    with pytest.raises(ValueError, match="there is no control"), controls.controlled(None, pairs, control, betas={}):
        pass


def test_a_folder_without_a_linked_model_is_refused(controls: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seed's folder of linked\.py"):
        next(controls.linked(tmp_path))


def test_beta_is_the_median_ratio_of_the_weights_over_tokens_that_are_no_padding(
    controls: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model()
    rows = [{"input_ids": [1, 2, 3, 4, 5], "labels": [5] * 5}, {"input_ids": [9, 8, 7], "labels": [5] * 3}]
    monkeypatch.setattr(controls, "tokenize_dataset", lambda *args, **options: rows)
    asked = SimpleNamespace(model=model, retain=None, tokenizer=SimpleNamespace(pad_token_id=0))
    found = controls.median_ratios(asked)
    ratios: dict[int, list[float]] = {0: [], 1: []}

    def note(layer_idx: int, output: Any) -> None:
        top = output[0].softmax(-1).sort(-1, descending=True).values
        ratios[layer_idx] += (top[:, 1] / top[:, 0]).tolist()

    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda gate, args, output, i=i: note(i, output))
    with torch.no_grad():
        for row in rows:  # one by one: no padding
            model(input_ids=torch.tensor([row["input_ids"]]))
    for i in (0, 1):
        assert found[i] == pytest.approx(sorted(ratios[i])[(len(ratios[i]) - 1) // 2], rel=1e-5)
