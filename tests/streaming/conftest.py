"""A small checkpoint in several shards, the same model whole in memory, and sets of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.families import build, randomise
from tests.training.conftest import make_model, make_sets, make_tokenizer
from uoe_peft.moe import find_moe_blocks
from uoe_peft.streaming import StreamedModel, on_disk
from uoe_peft.streaming.reader import PartReader

Open = Callable[..., Any]
SaveFamily = Callable[[str], tuple[Path, Any]]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Qwen2MoE of 3 layers in shards that cut through its layers."""
    path = tmp_path / "checkpoint"
    make_model().save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture
def resident(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")


@pytest.fixture
def opened(checkpoint: Path) -> Open:
    """Opens the checkpoint, with further options."""
    return lambda **options: StreamedModel.from_pretrained(checkpoint, **{"show_progress": False, **options})


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def sets() -> tuple[Dataset, Dataset]:
    return make_sets()


def save_family(family: str, folder: Path) -> tuple[Path, Any]:
    """Save a family's tiny model; the folder, and what transformers loads from it."""
    built = build(family)
    randomise(built)
    built.save_pretrained(folder / family)
    return folder / family, type(built).from_pretrained(folder / family, dtype=torch.float32).eval()


@pytest.fixture
def saved_family(tmp_path: Path) -> SaveFamily:
    """Saves a family's tiny model; returns the folder, and what transformers loads from it."""
    return lambda family: save_family(family, tmp_path)


def open_in_blocks(folder: Path, *, experts_a_block: int = 2, **options: Any) -> Any:
    """Open a checkpoint with a byte too little for a layer and its experts, so that these are read in blocks."""
    options.setdefault("show_progress", False)
    whole: Any = StreamedModel.from_pretrained(folder, **options)
    an_expert = max(
        sum(p.numel() // block.num_experts for p in block.storage.module.parameters() if p.dim() == 3)
        for block in find_moe_blocks(whole)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "BLOCK_BYTES", experts_a_block * an_expert * whole.dtype.itemsize)
        patch.setattr(on_disk, "BLOCKS", 1)  # there is not room for three of most sizes
        limit = whole._residence.least_bytes - 1
        model: Any = StreamedModel.from_pretrained(folder, layer_memory=limit, **options)
    assert model._on_disk
    return model


def layers_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each decoder layer is added whenever it is read from now on."""
    reads: list[int] = []
    whole = PartReader.read

    def counted(self: PartReader, belongs: Any) -> dict[str, Tensor]:
        found = whole(self, belongs)
        reads.extend({int(name.split(".")[2]) for name in found if ".layers." in name})
        return found

    monkeypatch.setattr(PartReader, "read", counted)
    return reads
