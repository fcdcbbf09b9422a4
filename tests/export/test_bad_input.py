"""What cannot be merged is refused by name, and nothing half-written is left."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file

from tests.export.conftest import adapted, assert_same_bits, save_base, tensors
from tests.families import build
from uoe_peft.export import checkpoint, merge_checkpoint, output, rewriting, saved_adapter, unmerge_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `adapter`; tests take copies of what they break."""
    folder = tmp_path_factory.mktemp("saved")
    save_base(build("qwen2_moe"), folder / "base")
    adapted(build("qwen2_moe")).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def work(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "work"))


def merge(work: Path, **kwargs: Any) -> Any:
    return merge_checkpoint(work / "base", work / "adapter", work / "out", **kwargs)


def refused(work: Path, match: str, **kwargs: Any) -> None:
    """The merge raises, and leaves neither an output nor anything beside it."""
    before = sorted(path.name for path in work.iterdir())
    with pytest.raises((ValueError, OSError), match=match):
        merge(work, **kwargs)
    assert sorted(path.name for path in work.iterdir()) == before


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def touched_shard(work: Path) -> Path:
    edit = merge(work, dry_run=True)
    return work / "base" / edit.tensors[0].shard


def test_a_dry_run_lists_tensors_and_bytes_and_writes_nothing(work: Path) -> None:
    before = sorted(path for path in work.rglob("*"))
    edit = merge(work, dry_run=True)
    assert sorted(path for path in work.rglob("*")) == before
    names = {tensor.tensor: tensor.num_bytes for tensor in edit.tensors}
    layer = "model.layers.2.mlp"
    matrices = [f"{layer}.experts.{e}.{m}_proj.weight" for e in (1, 4) for m in ("gate", "up", "down")]
    assert names == {**dict.fromkeys(matrices, 24 * 32 * 4), f"{layer}.gate.weight": 6 * 32 * 4}
    sizes = sum((work / "base" / shard).stat().st_size for shard in {tensor.shard for tensor in edit.tensors})
    assert edit.num_bytes == sizes and edit.shards is None
    assert f"{6 * 24 * 32 * 4 + 6 * 32 * 4:,} bytes change in 7 tensors" in edit.summary()


def test_hashes_links_and_everything_beside_the_weights(work: Path) -> None:
    (work / "base" / "tokenizer.json").write_text("{}")
    (work / "base" / "pytorch_model.bin").write_bytes(b"what was forgotten")
    (work / "base" / "original").mkdir()
    edit = merge(work)
    assert edit.left_out == ("original", "pytorch_model.bin")
    for shard, digest in edit.shards.rewritten.items():
        assert hashlib.sha256((work / "out" / shard).read_bytes()).hexdigest() == digest
        assert not os.path.samefile(work / "out" / shard, work / "base" / shard)
    for shard in edit.shards.linked:
        assert os.path.samefile(work / "out" / shard, work / "base" / shard)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (work / "out" / name).read_bytes() == (work / "base" / name).read_bytes()
        assert not os.path.samefile(work / "out" / name, work / "base" / name)
    copied = merge_checkpoint(work / "base", work / "adapter", work / "copied", link=False)
    assert copied.shards is not None and not copied.shards.linked and copied.shards.copied == edit.shards.linked
    assert_same_bits(tensors(work / "copied"), tensors(work / "out"))


def test_only_the_touched_shards_on_request(work: Path) -> None:
    edit = merge(work, only_touched=True)
    assert {path.name for path in (work / "out").glob("*.safetensors")} == {t.shard for t in edit.tensors}
    assert len(edit.left_out) == len(list((work / "base").glob("*.safetensors"))) - len({t.shard for t in edit.tensors})


def test_a_strength_scales_every_delta(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PeftConfig.from_pretrained(str(work / "adapter"))
    config.strength = 0.5
    monkeypatch.setattr(saved_adapter.PeftConfig, "from_pretrained", lambda _: config)
    merge(work)
    layer, before, after = "model.layers.2.mlp", tensors(work / "base"), tensors(work / "out")
    deltas = load_file(work / "adapter" / "adapter_model.safetensors")
    down = deltas[f"base_model.model.{layer}.experts.uoe_delta.down_proj"][1]
    gate = deltas[f"base_model.model.{layer}.gate.uoe_delta.weight"][0]
    name = f"{layer}.experts.4.down_proj.weight"
    torch.testing.assert_close(after[name], before[name] + 0.5 * down)
    torch.testing.assert_close(after[f"{layer}.gate.weight"], before[f"{layer}.gate.weight"] + 0.5 * gate)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"target_experts": [[7, 1], [7, 4]]},
            r"expects layer 7 has experts; .* the layers \[0, 1, 2\]",
        ),
        ({"target_experts": [[2, 1], [2, 6]]}, r"more than 6 experts in layer 2; in the given model it has 6"),
        ({"target_experts": [[2, 1]]}, "should hold 1 deltas of model.layers.2.mlp.experts.gate_up_proj"),
        ({"target_projections": ["w1"]}, "a projection 'w1'"),
        ({"train_router": False}, "deltas of .*gate.* no such slices"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"base_experts": {"2": {"num_experts": 9}}}, "expects 9 experts in layer 2"),
    ],
)
def test_an_adapter_for_another_model_is_named(change: dict[str, Any], match: str, work: Path) -> None:
    edit_json(work / "adapter" / "adapter_config.json", **change)
    refused(work, match)


def test_slices_of_another_shape_foreign_keys_and_nan(work: Path) -> None:
    path = work / "adapter" / "adapter_model.safetensors"
    whole = load_file(path)
    key = next(name for name in whole if name.endswith("experts.uoe_delta.down_proj"))
    save_file({**whole, key: whole[key][:, :, :-1].contiguous()}, path)
    refused(work, r"shape \(32, 23\) for .*down_proj; in the given model its slices are \(32, 24\)")
    save_file({**whole, "base_model.model.model.norm.weight": torch.ones(3)}, path)
    refused(work, r"holds more than deltas of slices.*model\.norm\.weight")
    save_file({name: tensor for name, tensor in whole.items() if name != key}, path)
    refused(work, "should hold 2 deltas of .*down_proj.*has none")
    broken = whole[key].clone()
    broken[0, 0, 0] = float("nan")
    save_file({**whole, key: broken}, path)
    refused(work, "NaNs detected in the merged weights")
    path.write_bytes(path.read_bytes()[:-7])
    refused(work, "is not a whole safetensors file")
    path.unlink()
    refused(work, r"has no adapter_model\.safetensors")
    LoraConfig(target_modules=["q_proj"]).save_pretrained(str(work / "adapter"))
    refused(work, "expected one of UOE")


def test_broken_checkpoints(work: Path) -> None:
    shard = touched_shard(work)
    index = work / "base" / "model.safetensors.index.json"
    content, names = shard.read_bytes(), json.loads(index.read_text())
    shard.write_bytes(content[:-5])
    refused(work, f"{shard.name} is not a whole safetensors file")
    shard.write_bytes(b"\xff" * 100)
    refused(work, f"{shard.name} is not a whole safetensors file")
    shard.unlink()
    refused(work, f"has no {shard.name}, which its model.safetensors.index.json names")
    shard.write_bytes(content)
    moved = dict.fromkeys(names["weight_map"], shard.name)
    index.write_text(json.dumps({**names, "weight_map": {**moved, **names["weight_map"], "x": "none.safetensors"}}))
    refused(work, "has no none.safetensors")
    index.write_text(json.dumps({**names, "weight_map": {"model.norm.weight": shard.name}}))
    refused(work, "has no tensor model.layers.2.mlp.experts.1.gate_proj.weight")
    index.write_text("{")
    refused(work, "cannot be read")
    index.unlink()
    refused(work, "but no model.safetensors.index.json")
    for path in (work / "base").glob("*.safetensors"):
        path.unlink()
    refused(work, "expected a checkpoint in safetensors format")


def test_an_index_that_names_another_shard_and_a_tensor_of_another_shape(work: Path) -> None:
    shard = touched_shard(work)
    index = work / "base" / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    other = next(name for name in names["weight_map"].values() if name != shard.name)
    key = merge(work, dry_run=True).tensors[0].tensor
    index.write_text(json.dumps({**names, "weight_map": {**names["weight_map"], key: other}}))
    refused(work, f"{other} of .* has no tensor {key}")
    index.write_text(json.dumps(names))
    stored = load_file(shard)
    save_file({**stored, key: stored[key][:-1].contiguous()}, shard)
    refused(work, rf"{key} of .* is stored as F32 of shape \(23, 32\)")
    save_file({**stored, key: stored[key].to(torch.float8_e4m3fn)}, shard)
    refused(work, "Quantised weights cannot be edited")


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq"])
def test_quantised_checkpoints_are_refused_with_the_reason(method: str, work: Path) -> None:
    edit_json(work / "base" / "config.json", quantization_config={"quant_method": method, "bits": 4})
    refused(work, rf"is quantised \({method}\): its weights are stored with scales")


def test_an_output_that_exists_is_never_touched(work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "mine").write_text("x")
    refused(work, "exists and is not an empty folder")
    assert (work / "out" / "mine").read_text() == "x"
    shutil.rmtree(work / "out")
    (work / "out").write_text("a file")
    refused(work, "exists and is not an empty folder")
    (work / "out").unlink()
    (work / "out").mkdir()
    merge(work)  # an empty folder is nothing
    (work / "backup").mkdir()
    (work / "backup" / "original_slices.safetensors").write_text("the only copy")
    with pytest.raises(ValueError, match="of an earlier merge"):
        merge_checkpoint(work / "base", work / "adapter", work / "second", backup=work / "backup")


@pytest.mark.parametrize("after", [0, 3000, 20_000])
def test_a_disk_that_fills_up_leaves_nothing(after: int, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    original = rewriting._copy

    def full(old: Any, put: Callable[[bytes], None], size: int) -> None:
        def counted(block: bytes) -> None:
            nonlocal written
            written += len(block)
            if written > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            put(block)

        original(old, counted, size)

    monkeypatch.setattr(rewriting, "_copy", full)
    (work / "backup").mkdir()
    refused(work, "No space left", backup=work / "backup")
    assert not list((work / "backup").iterdir())


def test_too_small_a_disk_is_said_before(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    refused(work, r"writing needs 0\.00 GB, 0\.00 GB are free")


def test_a_disk_that_lies_is_noticed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "sha256", lambda _: "0" * 64)
    refused(work, "what was read back is not what was written")


def test_files_that_cannot_be_linked_are_copied(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    for path in (work / "base").iterdir():
        path.chmod(0o444)  # a base that cannot be written is enough
    (work / "base").chmod(0o555)
    monkeypatch.setattr(rewriting.os, "link", no_link)
    edit = merge(work)
    assert edit.shards.copied and not edit.shards.linked
    (work / "base").chmod(0o755)
    for path in (work / "out").iterdir():
        assert path.stat().st_mode & 0o200, path  # and what comes out can


def test_a_backup_is_of_one_merge_only(work: Path) -> None:
    merge(work, backup=work / "backup")
    with pytest.raises(ValueError, match="is not what the merge wrote"):
        unmerge_checkpoint(work / "base", work / "backup", work / "restored")
    with pytest.raises(ValueError, match=r"has no original_slices\.safetensors"):
        unmerge_checkpoint(work / "out", work / "base", work / "restored")
    save_file({"0": torch.zeros(3)}, work / "adapter" / "original_slices.safetensors")
    with pytest.raises(ValueError, match="is not a backup"):
        unmerge_checkpoint(work / "out", work / "adapter", work / "restored")
    plan = unmerge_checkpoint(work / "out", work / "backup", work / "restored", dry_run=True)
    assert len(plan.tensors) == 7 and not (work / "restored").exists()
    stored = load_file(work / "backup" / "original_slices.safetensors")  # any reader of the format can open it
    assert sum(tensor.numel() for tensor in stored.values()) == sum(tensor.num_bytes for tensor in plan.tensors)


def test_a_checkpoint_on_the_hub_is_downloaded_shard_by_shard(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def snapshot(repo_id: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("org/model", "v1") and "*.safetensors" in ignore_patterns
        return str(work / "base")

    def download(repo_id: str, filename: str, *, revision: str | None) -> str:
        fetched.append(filename)
        return str(work / "base" / filename)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    monkeypatch.setattr(checkpoint, "hf_hub_download", download)
    edit = merge_checkpoint("org/model", work / "adapter", work / "out", only_touched=True, revision="v1")
    assert sorted(fetched) == sorted({tensor.shard for tensor in edit.tensors})
    whole = merge_checkpoint(work / "base", work / "adapter", work / "whole")
    for shard in edit.shards.rewritten if edit.shards else ():
        assert (work / "out" / shard).read_bytes() == (work / "whole" / shard).read_bytes()
    assert whole.shards is not None
