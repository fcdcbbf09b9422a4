"""A checkpoint on the Hub: of its weights only those shards are downloaded that hold what is asked for."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from uoe_peft.moe.passes import run_passes
from uoe_peft.streaming import StreamedModel
from uoe_peft.streaming import checkpoint as reading
from uoe_peft.streaming.reader import PartReader

NAME = "someone/some-moe"
INDEX = "model.safetensors.index.json"


def in_a_shard_each(checkpoint: Path) -> None:
    """Put every layer into a shard of its own, and the rest into another."""
    shards = list(checkpoint.glob("*.safetensors"))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in (item for shard in shards for item in load_file(shard).items()):
        part = f"layer-{name.split('.')[2]}" if ".layers." in name else "rest"
        parts.setdefault(f"{part}.safetensors", {})[name] = tensor
    for shard in shards:
        shard.unlink()
    for shard_name, tensors in parts.items():
        save_file(tensors, checkpoint / shard_name, metadata={"format": "pt"})
    weight_map = {name: shard_name for shard_name, tensors in parts.items() for name in tensors}
    (checkpoint / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def headers(path: Path) -> SafetensorsFileMetadata:
    """What the Hub says of a shard, from its first bytes."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    entries = json.loads(path.read_bytes()[8 : 8 + length])
    tensors = {
        name: TensorInfo(dtype=entry["dtype"], shape=entry["shape"], data_offsets=tuple(entry["data_offsets"]))
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    return SafetensorsFileMetadata(metadata={}, tensors=tensors)


class FakeHub:
    """A folder that is given out file by file, as into the cache of huggingface_hub."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.is_online = True
        self.downloaded: list[str] = []

    def snapshot_download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert name == NAME
        self.cache.mkdir(exist_ok=True)
        for path in (path for pattern in allow_patterns for path in self.remote.glob(pattern)):
            shutil.copy(path, self.cache)
        return str(self.cache)

    def get_safetensors_metadata(self, name: str, *, revision: str | None) -> SafetensorsRepoMetadata:
        if not self.is_online:
            raise OfflineModeIsEnabled("offline")
        found = {path.name: headers(path) for path in self.remote.glob("*.safetensors")}
        weight_map = {name: shard for shard, file in found.items() for name in file.tensors}
        return SafetensorsRepoMetadata(metadata={}, sharded=True, weight_map=weight_map, files_metadata=found)

    def hf_hub_download(self, name: str, shard: str, *, revision: str | None) -> str:
        assert name == NAME
        self.downloaded.append(shard.removesuffix(".safetensors"))
        return shutil.copy(self.remote / shard, self.cache)


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    in_a_shard_each(checkpoint)
    fake = FakeHub(checkpoint, tmp_path / "cache")
    monkeypatch.setattr(reading, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(reading, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(reading, "HfApi", lambda: fake)
    return fake


def opened(**options: Any) -> Any:
    return StreamedModel.from_pretrained(NAME, show_progress=False, **options)


@torch.no_grad()
def test_shards_are_downloaded_when_their_layers_are_asked_for(hub: FakeHub, resident: PreTrainedModel) -> None:
    model = opened()
    assert hub.downloaded == ["rest"]  # the last norm
    model.keep_layers([1])
    assert hub.downloaded == ["rest", "layer-1"]
    ids = torch.arange(2, 14).view(2, 6)
    assert torch.equal(model(input_ids=ids).logits, resident(input_ids=ids).logits)
    assert sorted(hub.downloaded) == ["layer-0", "layer-1", "layer-2", "rest"]  # each once


def test_what_was_downloaded_is_opened_without_the_hub(hub: FakeHub) -> None:
    opened().keep_layers([0, 1, 2])
    hub.is_online = False
    hub.downloaded.clear()
    opened().keep_layers([2])
    assert hub.downloaded == []


def test_a_disk_that_is_too_small_for_the_download_is_said_first(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.warns(UserWarning, match=r"GiB that are not downloaded yet, .* set HF_HOME"):
        opened()


def test_layers_that_the_model_does_not_have_are_not_downloaded(hub: FakeHub) -> None:
    extra = {"model.layers.3.mlp.gate.weight": torch.zeros(6, 32)}
    save_file(extra, hub.remote / "extra.safetensors", metadata={"format": "pt"})
    opened().keep_layers([0, 1, 2])
    assert "extra" not in hub.downloaded


def test_a_run_that_was_stopped_while_shards_were_downloaded_goes_on(
    hub: FakeHub, resident: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(2, 14).view(2, 6)

    def swept(model: Any) -> list[Tensor]:
        with torch.no_grad():
            return [output.logits for output, _ in run_passes(model, [partial(model, input_ids=ids)])]

    model = opened(state_dir=tmp_path / "states")
    model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        swept(model)
    reads, read = [], PartReader.read
    monkeypatch.setattr(PartReader, "read", lambda self, belongs: reads.extend(found := read(self, belongs)) or found)
    (found,) = swept(opened(state_dir=tmp_path / "states"))
    assert torch.equal(found, resident(input_ids=ids).logits)
    assert {int(name.split(".")[2]) for name in reads if ".layers." in name} == {2}
