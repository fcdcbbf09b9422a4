"""Single experts on disk, read straight into a stack, are what a stack of them is by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from uoe_peft.streaming import StreamedModel
from uoe_peft.streaming.checkpoint import StoredTensor
from uoe_peft.streaming.reader import PartReader
from uoe_peft.streaming.stacks import find_stack

EXPERTS, HIDDEN, ROWS = 12, 20, 7  # beyond ten: names are not in the order of numbers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=30,
        hidden_size=HIDDEN,
        intermediate_size=16,
        moe_intermediate_size=ROWS,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def by_hand(folder: Path, layer_idx: int) -> dict[str, Tensor]:
    stored = on_disk(folder)

    def one(expert_idx: int, projection: str) -> Tensor:
        return stored[f"model.layers.{layer_idx}.mlp.experts.{expert_idx}.{projection}.weight"]

    gate_up = [torch.cat([one(index, "gate_proj"), one(index, "up_proj")]) for index in range(EXPERTS)]
    return {
        "gate_up_proj": torch.stack(gate_up).float(),
        "down_proj": torch.stack([one(index, "down_proj") for index in range(EXPERTS)]).float(),
    }


@pytest.mark.parametrize("stored_as", [torch.bfloat16, torch.float32])
def test_every_expert_is_in_its_place(stored_as: torch.dtype, folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({name: t.to(stored_as) for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    model: Any = StreamedModel.from_pretrained(folder, dtype="float32", show_progress=False)
    assert len(model._residence._reader._stacks) == 4
    model.keep_layers([0, 1])
    for layer_idx, layer in enumerate(model.model.layers):
        for name, stack in by_hand(folder, layer_idx).items():
            assert torch.equal(getattr(layer.mlp.experts, name), stack)
            assert len(set(stack.flatten(1).sum(dim=1).tolist())) == EXPERTS


def test_what_is_computed_in_something_narrower_is_rounded_once(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        made = {name: tensor.float() * 1.0001 for name, tensor in load_file(path).items()}
        save_file(made, path, metadata={"format": "pt"})
    model: Any = StreamedModel.from_pretrained(folder, dtype="bfloat16", show_progress=False)
    model.keep_layers([1])
    for name, stack in by_hand(folder, 1).items():
        assert torch.equal(getattr(model.model.layers[1].mlp.experts, name), stack.bfloat16())


def test_stacks_are_there_once_while_they_are_read(folder: Path) -> None:
    model: Any = StreamedModel.from_pretrained(folder, dtype="float32", show_progress=False)
    reader: PartReader = model._residence._reader
    names = {name for name in dict(model.named_parameters()) if ".layers.1." in name}
    stacks = {name for name in names if ".experts." in name}
    others = reader.num_bytes(names) - reader.num_bytes(stacks)
    assert reader.num_bytes(stacks) == 2 * EXPERTS * 3 * HIDDEN * ROWS
    assert reader.peak_bytes(names) == reader.num_bytes(names) + others // 3


def test_an_expert_that_is_missing_is_said_when_the_model_is_opened(folder: Path) -> None:
    name = "model.layers.1.mlp.experts.11.up_proj.weight"
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    path = folder / content["weight_map"].pop(name)
    save_file({key: t for key, t in load_file(path).items() if key != name}, path, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"cannot be made those of a Qwen3MoeForCausalLM, .* a part may be missing"):
        StreamedModel.from_pretrained(folder)


def found(operations: list[Any], *, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 6, 5)) -> Any:
    """The stack of two experts' `a (4, 5)` and `b (2, 5)`."""
    patterns = ["experts.*.a", "experts.*.b"]
    sources = {pattern: [pattern.replace("*", str(index)) for index in range(2)] for pattern in patterns}
    tensors = {
        name: StoredTensor("shard", torch.float32, (4 if name.endswith("a") else 2, 5))
        for names in sources.values()
        for name in names
    }
    converter = WeightConverter(patterns, "experts.stack", operations=operations)
    return find_stack(converter, sources, tensors, torch.empty(shape, dtype=dtype, device="meta"))


def test_only_plain_stacks_are_taken() -> None:
    plain = [MergeModulelist(dim=0), Concatenate(dim=1)]
    assert found(plain).places == {
        "experts.0.a": (0, 0),
        "experts.1.a": (1, 0),
        "experts.0.b": (0, 4),
        "experts.1.b": (1, 4),
    }
    assert found([MergeModulelist(dim=0), Concatenate(dim=2)]) is None
    assert found([*plain, Transpose(1, 2)]) is None
    assert found(plain, dtype=torch.bfloat16) is None
    for shape in ((3, 6, 5), (2, 7, 5), (2, 6, 4), (12, 5)):
        assert found(plain, shape=shape) is None
