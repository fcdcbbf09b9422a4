"""A process that is killed leaves nothing or a complete checkpoint, and the next call succeeds."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.export.conftest import adapted, assert_same_bits, save_base, tensors
from tests.families import EXPERT, build
from tests.forked import dies_at, forked, on_changes_below
from uoe_peft.export import export_lora, merge_checkpoint, rewriting, unmerge_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LAYER = "model.layers.2.mlp"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `adapter`, and the checkpoint `merged` with its `backup`."""
    folder = tmp_path_factory.mktemp("saved")
    save_base(build("qwen2_moe"), folder / "base")
    adapted(build("qwen2_moe")).save_pretrained(folder / "adapter")
    merge_checkpoint(folder / "base", folder / "adapter", folder / "merged", backup=folder / "backup")
    return folder


@pytest.fixture(scope="module")
def expected(saved: Path) -> dict[str, Tensor]:
    """The merged tensors, by hand: those of the base, and the deltas of the adapter's file added where they belong."""
    deltas, found = load_file(saved / "adapter" / "adapter_model.safetensors"), tensors(saved / "base")
    stack = f"base_model.model.{LAYER}.experts.uoe_delta"
    for position, expert_idx in enumerate((1, 4)):
        up = deltas[f"{stack}.gate_up_proj"][position]
        parts = {"gate": up[:EXPERT], "up": up[EXPERT:], "down": deltas[f"{stack}.down_proj"][position]}
        for matrix, delta in parts.items():
            found[f"{LAYER}.experts.{expert_idx}.{matrix}_proj.weight"] += delta
    found[f"{LAYER}.gate.weight"] += deltas[f"base_model.model.{LAYER}.gate.uoe_delta.weight"][0]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def number_of_steps(work: Callable[[Path], object], place: Path) -> int:
    """How often `work` changes something in a folder."""
    record = place.with_name("steps")

    def counted() -> None:
        with record.open("w") as lines:
            on_changes_below(place, lambda change: print(change, file=lines))
            work(place)
            lines.flush()

    assert forked(counted) == 0
    shutil.rmtree(place)
    return len(record.read_text().splitlines())


def killed_everywhere(work: Callable[[Path], object], place: Path) -> Iterator[bool]:
    """Kill `work` before each of its steps, in a fresh folder each time; whether anything had appeared as `out`."""
    steps = number_of_steps(work, place)
    assert steps > 10
    for step in range(1, steps + 1):

        def killed(step: int = step) -> None:
            dies_at(step, place)
            work(place)

        assert forked(killed) == -signal.SIGKILL, step
        yield (place / "out").exists()
        shutil.rmtree(place)


def test_a_merge_that_is_killed_at_any_step(saved: Path, expected: dict[str, Tensor], tmp_path: Path) -> None:
    place, before = tmp_path / "place", files(saved)

    def merge(place: Path) -> None:
        merge_checkpoint(saved / "base", saved / "adapter", place / "out", backup=place / "backup")

    appeared = []
    for exists in killed_everywhere(merge, place):
        appeared.append(exists)
        had_backup = (place / "backup" / "original_slices.safetensors").exists()
        assert had_backup or not exists  # no output without a way back
        if not exists:  # with the same backup folder, which may hold the backup already
            merge(place)
        assert_same_bits(tensors(place / "out"), expected)
        assert {path.name for path in place.iterdir()} == {"out", "backup"}
        assert [path.name for path in (place / "backup").iterdir()] == ["original_slices.safetensors"]
        if had_backup:
            unmerge_checkpoint(place / "out", place / "backup", place / "restored")
            assert_same_bits(tensors(place / "restored"), tensors(saved / "base"))
    assert appeared.count(False) > 10  # the output is the last thing that happens
    assert files(saved) == before


def test_an_unmerge_that_is_killed_at_any_step(saved: Path, tmp_path: Path) -> None:
    place, original = tmp_path / "place", tensors(saved / "base")

    def unmerge(place: Path) -> None:
        unmerge_checkpoint(saved / "merged", saved / "backup", place / "out")

    for exists in killed_everywhere(unmerge, place):
        if not exists:
            unmerge(place)
        assert_same_bits(tensors(place / "out"), original)
        assert [path.name for path in place.iterdir()] == ["out"]


def test_killed_in_the_middle_of_a_shard(
    saved: Path, expected: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_half(old: Any, put: Callable[[bytes], None], size: int) -> None:
        put(old.read(size // 2))
        os.kill(os.getpid(), signal.SIGKILL)

    arguments = (saved / "base", saved / "adapter", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(rewriting, "_copy", copy_half)
        assert forked(lambda: merge_checkpoint(*arguments)) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    merge_checkpoint(*arguments)
    assert_same_bits(tensors(tmp_path / "out"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_living_process_writes_is_no_remains(saved: Path, tmp_path: Path) -> None:
    from uoe_peft.export.output import appearing_at_once

    with appearing_at_once(tmp_path / "out") as folder:
        (folder / "mine").write_text("x")
        merge_checkpoint(saved / "base", saved / "adapter", tmp_path / "out.v2")
        with pytest.raises(RuntimeError, match="second"), appearing_at_once(tmp_path / "out") as other:
            assert other != folder
            raise RuntimeError("second")
        assert (folder / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.v2"}


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_system_that_refuses_to_write_leaves_nothing(share: float, saved: Path, tmp_path: Path) -> None:
    largest = max(path.stat().st_size for path in (saved / "base").glob("*.safetensors"))
    calls: list[Callable[..., object]] = [
        lambda: merge_checkpoint(saved / "base", saved / "adapter", tmp_path / "a", backup=tmp_path, link=False),
        lambda: unmerge_checkpoint(saved / "merged", saved / "backup", tmp_path / "b", link=False),
    ]
    if share < 0.5:  # its file is smaller than a shard
        calls.append(lambda: export_lora(saved / "adapter", tmp_path / "c", base=saved / "base", rank=5))
    for call in calls:
        with files_no_larger_than(int(share * largest)), pytest.raises(Exception, match=r"File too large|os error 27"):
            call()
        assert not list(tmp_path.iterdir())


def test_a_backup_that_cannot_be_written_is_said_before_the_work(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(rewriting, "rewrite", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=r"cannot write to .*file: .*; choose another folder"):
        merge_checkpoint(saved / "base", saved / "adapter", tmp_path / "out", backup=tmp_path / "file")
    with pytest.raises(ValueError, match=r"lies in output .*; name another folder"):
        merge_checkpoint(saved / "base", saved / "adapter", tmp_path / "out", backup=tmp_path / "out" / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_is_written_beside_the_outputs(saved: Path, tmp_path: Path) -> None:
    """As from a disk that is mounted for reading only: whatever would change a file of the inputs is refused."""

    def refuse(change: str) -> None:
        if "os.link" not in change:  # a second name changes no file; from another disk there is none
            raise OSError(30, f"Read-only file system: {change}")

    def work() -> None:
        on_changes_below(saved, refuse)
        merge_checkpoint(saved / "base", saved / "adapter", tmp_path / "out", backup=tmp_path / "backup")
        unmerge_checkpoint(tmp_path / "out", tmp_path / "backup", tmp_path / "restored")
        export_lora(saved / "adapter", tmp_path / "lora", base=saved / "base", rank=5)
        with pytest.raises(ValueError, match=r"cannot write to .*Read-only"):
            merge_checkpoint(saved / "base", saved / "adapter", saved / "out")

    assert forked(work) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "backup", "restored", "lora"}
    assert torch.equal(tensors(tmp_path / "restored")["lm_head.weight"], tensors(saved / "base")["lm_head.weight"])
