"""Unlearning without training: what the deltas do to the tokens they were solved for, and to what is kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.families import build as build_family
from uoe_peft.cli import main
from uoe_peft.moe import find_moe_blocks
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.training import solve_unlearning


@pytest.fixture
def facts() -> tuple[Dataset, Dataset]:
    """Some facts of the topic that is to be forgotten, and some of the others."""
    others = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC])
    columns = ["prompt", "completion"]
    forget = load_facts([FORGET_TOPIC]).select_columns(columns).select(range(60))
    return forget, others.select_columns(columns).shuffle(seed=0).select(range(180))


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype="float32").eval()


def token_accuracy(model: Any, rows: Dataset, tokenizer: Any) -> float:
    right = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"]])
        with torch.no_grad():
            said = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(dim=-1)
        right.append((said == ids[0, len(prompt) :]).float().mean().item())
    return sum(right) / len(right)


@pytest.mark.filterwarnings("ignore:the forget set does not single out one expert")
@pytest.mark.parametrize("target", ["direction", "gradient"])
def test_facts_are_forgotten_and_others_kept(facts: tuple[Dataset, Dataset], target: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
    forget, retain = facts
    model = solve_unlearning(
        base_model(),
        forget,
        retain.select(range(120)),
        processing_class=tokenizer,
        target_experts=[(0, 4), (2, 13), (3, 12)],  # which the topic uses more than the others do
        target=target,
        show_progress=False,
    )
    assert token_accuracy(model, forget.select(range(0, 60, 3)), tokenizer) < 0.85
    assert token_accuracy(model, retain.select(range(120, 160)), tokenizer) > 0.9
    with model.disable_adapter():
        assert token_accuracy(model, forget.select(range(0, 60, 6)), tokenizer) > 0.95


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "listed, router module"])
def test_the_delta_is_the_least_squares_solution(family: str, tokenizer: Any, sets: Any) -> None:
    """With every strength allowed, the delta solves the system that is stacked from single tokens."""
    base = build_family(family)
    untouched = copy.deepcopy(base)
    block = find_moe_blocks(untouched)[-1]
    rows = {"forget": texts(20, "f"), "retain": texts(25, "r")}
    expert_idx = 1
    inputs = {
        name: down_inputs(untouched, block, expert_idx, fitted(dataset, tokenizer), tokenizer)
        for name, dataset in rows.items()
    }
    weight = block.storage.weight(block.storage.projections[-1], expert_idx).detach().double()
    weight = weight.T if block.storage.is_transposed(block.storage.projections[-1]) else weight
    model = solve_unlearning(
        base,
        rows["forget"],
        rows["retain"],
        processing_class=tokenizer,
        target_experts=[(block.layer_idx, expert_idx)],
        target="zero",
        retain_weight=2.0,
        ridge=0.1,
        keep_retain=1e-9,
        show_progress=False,
    )
    forget, retain = (inputs[name].double() for name in ("forget", "retain"))
    mean = (forget.square().mean(dim=0) + 2 * retain.square().mean(dim=0)).mean()
    left = np.concatenate(
        [
            forget / len(forget) ** 0.5,
            (2 / len(retain)) ** 0.5 * retain,
            (0.1 * mean) ** 0.5 * torch.eye(forget.shape[1]),
        ]
    )
    right = np.zeros((len(left), len(weight)))
    right[: len(forget)] = -(forget @ weight.T) / len(forget) ** 0.5
    expected = torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0].T)
    (found,) = [p.detach()[0] for n, p in model.named_parameters() if ".uoe_delta." in n]
    found = found.T if block.storage.is_transposed(block.storage.projections[-1]) else found
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def texts(number: int, word: str) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [f"{word}{i} " * 3 for i in range(number)], "completion": [f"{7 * i}{word}" for i in range(number)]}
    )


def fitted(dataset: Dataset, tokenizer: Any) -> list[list[int]]:
    """Token ids of the rows that are solved for: all but a fifth of them, taken in order of falling length."""
    ids = [tokenizer(r["prompt"] + r["completion"])["input_ids"] + [tokenizer.eos_token_id] for r in dataset]
    order = np.random.default_rng(0).permutation(len(ids))
    longest_first = sorted((ids[i] for i in order), key=len, reverse=True)
    return [row for place, row in enumerate(longest_first) if place % 5]


def down_inputs(model: nn.Module, block: Any, expert_idx: int, rows: list[list[int]], tokenizer: Any) -> Tensor:
    """Weighted inputs of one expert's last matrix, from what it adds to its block's output for identity matrices."""
    projection = block.storage.projections[-1]
    down = block.storage.weight(projection, expert_idx)
    seen: list[Tensor] = []
    listed = isinstance(block.experts, nn.ModuleList)
    module = model.get_submodule(block.experts_name.rpartition(".")[0]) if listed else block.experts

    def run(matrix: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, a, out: outputs.append(out.detach().flatten(0, -2)))
        with torch.no_grad():
            before = down.clone()
            down.copy_(matrix)
            for row in rows:
                model(input_ids=torch.tensor([row]))
            down.copy_(before)
        handle.remove()
        return torch.cat(outputs)

    transposed = block.storage.is_transposed(projection)
    size, outputs_at_once = down.shape if transposed else tuple(reversed(down.shape))
    nothing = run(torch.zeros_like(down))
    for start in range(0, size, outputs_at_once):  # as many inputs as there are outputs become visible at once
        picked = torch.zeros(outputs_at_once, size)
        width = min(outputs_at_once, size - start)
        picked[range(width), range(start, start + width)] = 1
        seen.append((run(picked.T if transposed else picked) - nothing)[:, :width])
    found = torch.cat(seen, dim=1)
    return found[found.abs().amax(dim=1) > 1e-9]


def test_bad_input_is_named(facts: tuple[Dataset, Dataset], build: Any, tokenizer: Any, sets: Any) -> None:
    forget, retain = sets

    def solve(model: Any = None, **options: Any) -> None:
        solve_unlearning(
            build.model() if model is None else model,
            options.pop("forget", forget),
            options.pop("retain", retain),
            processing_class=tokenizer,
            show_progress=False,
            **{"target_experts": [(1, 2)], **options},
        )

    with pytest.raises(ValueError, match="the model has an adapter already"):
        solve(build.uoe(build.model()))
    with pytest.raises(ValueError, match=r"target must be one of .* got 'up'"):
        solve(target="up")
    with pytest.raises(ValueError, match="coefficient must be > 0"):
        solve(coefficient=0)
    with pytest.raises(ValueError, match=r"keep_retain must be in \(0, 1\]"):
        solve(keep_retain=1.5)
    with pytest.raises(ValueError, match="retain_weight must be >= 0"):
        solve(retain_weight=-1)
    with pytest.raises(ValueError, match="got expert_idx=9; use 0 to 5"):
        solve(target_experts=[(1, 9)])
    with pytest.raises(ValueError, match="the retain set has one row; expected at least two"):
        solve(retain=retain.select([0]))
    with pytest.raises(ValueError, match="the forget set is empty"):
        solve(forget=forget.select([]))


@pytest.mark.filterwarnings("ignore:fewer tokens of the forget set reach a slice")
def test_the_command_writes_an_adapter_that_loads(facts: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    for name, rows in zip(("forget", "retain"), facts, strict=True):
        rows.to_json(tmp_path / f"{name}.jsonl")
    base = str(checkpoint_path("base"))
    sets = [f for n in ("forget", "retain") for f in (f"--{n}_dataset", str(tmp_path / f"{n}.jsonl"))]
    options = ["--target_experts", "0:3", "--max_tokens", "2000", "--dtype", "float32"]
    main(["solve", "--model_name_or_path", base, *sets, *options, "--output_dir", str(tmp_path / "adapter")])
    model = PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    assert model.active_peft_config.target_experts == [(0, 3)]
    assert any(p.any() for n, p in model.named_parameters() if ".uoe_delta." in n)
