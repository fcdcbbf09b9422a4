"""How `benchmarks/dense.py` chooses a rate, and what its grounds train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tests.dense.conftest import LAYERS, make_model, weights
from tests.training.conftest import make_tokenizer
from uoe_peft.data import collate

PART, LOSS = "LoRA", "nll 8"


@pytest.fixture(scope="module")
def scripts() -> Iterator[tuple[ModuleType, ModuleType]]:
    """The two scripts, which import their neighbours as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import dense
        import dense_grounds

        yield dense, dense_grounds


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def run(rate: float, forget: list[float], retain: list[float], *, part: str = PART, seed: int = 0) -> dict[str, Any]:
    return {"part": part, "loss": LOSS, "rate": rate, "seed": seed, "forget": forget, "retain": retain}


def test_validation_rows_choose_the_rate(scripts: tuple[ModuleType, ModuleType]) -> None:
    runs = [
        run(0.1, [0.9, 0.0], [1.0, 1.0]),  # best on the rows that are reported
        run(0.2, [0.1, 0.6], [0.8, 0.6]),
        run(0.3, [0.0, 0.5], [0.6, 0.6]),
        run(0.4, [0.0, 0.0], [1.0, 1.0], part="all parameters"),
        run(0.5, [0.0, 0.0], [1.0, 1.0], seed=1),
    ]
    assert scripts[0].chosen_rate(PART, LOSS, runs) == 0.2
    with pytest.raises(ValueError, match="run seed 0 of 'LoRA' with 'hidden 3' first"):
        scripts[0].chosen_rate(PART, "hidden 3", runs)


def test_all_parts_get_as_many_rates_and_later_seeds_the_chosen_one(scripts: tuple[ModuleType, ModuleType]) -> None:
    parts = ["LoRA", "all parameters"]
    args = SimpleNamespace(seeds=[0, 1], losses=[LOSS], parts=parts, factors=[0.5, 2.0])
    runs: list[dict[str, Any]] = []
    for key in scripts[0].planned(args, runs):
        runs.append({**key, "forget": [0.1, 0.1], "retain": [1 - key["rate"], 0.0]})
    usual = scripts[0].PARTS
    expected = [(part, 0, usual[part] * factor) for part in parts for factor in (0.5, 2.0)]
    expected += [(part, 1, usual[part] * 0.5) for part in parts]
    assert [(key["part"], key["seed"], key["rate"]) for key in runs[1:]] == expected
    assert runs[0]["part"] == "base"


def test_only_the_upper_layers_learn(
    scripts: tuple[ModuleType, ModuleType], tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "completion": f" w{2 * i + 3}"} for i in range(6)])
    model = make_model()
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    losses = []
    for epochs in (1, 30):
        torch.manual_seed(0)
        scripts[1].learn_above(model, 2, rows, tokenizer, epochs=epochs, peak=1e-2, bf16=False)
        batch = collate(scripts[1].tokenized(rows, tokenizer), pad_token_id=0)
        losses.append(model(**batch).loss.item())
    assert losses[1] < losses[0] - 0.1
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed and all(f"layers.{LAYERS - 1}." in name for name in changed)
    assert all(parameter.requires_grad for parameter in model.parameters())
