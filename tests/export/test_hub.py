"""Names on the Hub, from a cache as `huggingface_hub` keeps it: what is not needed need not be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.export.conftest import adapted, save_base
from tests.families import build
from uoe_peft.export import describe_adapter, export_lora, merge_checkpoint


def put_into_cache(cache: Path, name: str, files: dict[str, bytes]) -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    (repository / "snapshots" / commit).mkdir(parents=True)
    for number, (file, content) in enumerate(files.items()):
        (repository / "blobs" / f"{number:040x}").write_bytes(content)
        (repository / "snapshots" / commit / file).symlink_to(f"../../blobs/{number:040x}")


def test_only_the_shards_that_change_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(build("qwen2_moe"), tmp_path / "base")
    adapted(build("qwen2_moe")).save_pretrained(tmp_path / "adapter")
    whole = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "whole")
    touched = {edit.shard for edit in whole.tensors}
    held = {path.name: path.read_bytes() for path in base.iterdir()}
    others = [name for name in held if name.endswith(".safetensors") and name not in touched]
    assert len(others) > 3
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    put_into_cache(tmp_path / "cache", "org/base", {name: held[name] for name in held if name not in others})
    adapter = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    put_into_cache(tmp_path / "cache", "org/adapter", adapter)

    edit = merge_checkpoint("org/base", "org/adapter", tmp_path / "out", only_touched=True, backup=tmp_path / "backup")
    assert edit.tensors == whole.tensors and set(edit.left_out) == set(others)
    for shard in touched:
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "whole" / shard).read_bytes()
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(names.values()) == touched | set(others)
    for path in (tmp_path / "cache").rglob("blobs/*"):
        assert path.read_bytes() in [*held.values(), *adapter.values()]  # the cache is as it was

    assert describe_adapter("org/adapter").num_bytes == len(adapter["adapter_model.safetensors"])
    export_lora("org/adapter", tmp_path / "lora", base="org/base", rank=5, drop_router=True)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    with pytest.raises(LocalEntryNotFoundError):  # the whole output needs the other shards
        merge_checkpoint("org/base", "org/adapter", tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_untouched_shards_of_the_cache_are_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(build("qwen2_moe"), tmp_path / "base")
    adapted(build("qwen2_moe")).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    put_into_cache(tmp_path / "cache", "org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    edit = merge_checkpoint("org/base", tmp_path / "adapter", tmp_path / "out", revision="main")
    assert edit.shards is not None and edit.shards.linked
    for shard in edit.shards.linked:  # to the file itself: a link to the cache's relative one would lead nowhere
        path = tmp_path / "out" / shard
        assert not path.is_symlink() and path.stat().st_nlink == 2 and path.read_bytes() == (base / shard).read_bytes()
