"""Which shard holds which tensor, and indices that nobody should follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from uoe_peft.checkpoints import read_weight_map, shard_path

INDEX = "model.safetensors.index.json"


def test_one_file_needs_no_index_and_an_index_is_taken_at_its_word(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    assert read_weight_map(tmp_path) == {"a": "model.safetensors", "b": "model.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"c": "one.safetensors"}}))
    assert read_weight_map(tmp_path) == {"c": "one.safetensors"}
    with pytest.raises(ValueError, match=rf"has no one\.safetensors, which its {INDEX} names"):
        shard_path(tmp_path, "one.safetensors")
    assert shard_path(tmp_path, "model.safetensors") == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"weight_map": ["a"]}', b'{"weight_map": {"a": 3}}', b'{"weight_map": null}', b"\xff\xfe{}"],
)
def test_an_index_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{INDEX} cannot be read .*; download the checkpoint again"):
        read_weight_map(tmp_path)


@pytest.mark.parametrize("shard", ["../mine.safetensors", "/etc/passwd", "sub/one.safetensors", ".", ".."])
def test_an_index_must_not_lead_out_of_the_folder(shard: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": shard}}))
    with pytest.raises(ValueError, match="expected names of files beside it, without folders"):
        read_weight_map(tmp_path)


def test_shards_without_an_index_and_no_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model\.safetensors and no .*: expected a checkpoint in safetensors"):
        read_weight_map(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=rf"has the shards \['model-00001-of-00002.safetensors'\] but no {INDEX}"):
        read_weight_map(tmp_path)
