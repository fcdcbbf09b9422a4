"""Checkpoints of tiny models in many shards, and adapters for them, on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import build
from tests.tuner.conftest import make_config, randomise
from uoe_peft.moe import find_moe_blocks

# Names and cuts on disk: one by one, fused, renamed; listed by the family's folder in transformers.
FAMILIES = (
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "phimoe",
)


@pytest.fixture(scope="session")
def built() -> Iterator[dict[str, PreTrainedModel]]:
    """One model a family, made once; tests take copies."""
    yield {}


@pytest.fixture
def model_of(built: dict[str, PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    def get(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        if family not in built:
            built[family] = build(family)
        return copy.deepcopy(built[family]).to(dtype)

    return get


def save_base(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "40KB") -> Path:
    """A checkpoint in shards."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def adapted(model: PreTrainedModel, **kwargs: object) -> PeftModel:
    """The model with a random adapter of two experts of its last layer."""
    layer_idx = find_moe_blocks(model)[-1].layer_idx
    peft_model = get_peft_model(model, make_config(model, target_experts=[(layer_idx, 1), (layer_idx, 4)], **kwargs))
    randomise(peft_model)
    return peft_model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whatever its shards."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name
