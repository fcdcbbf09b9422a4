"""A checkpoint that is read tensor by tensor: which there are, of what size, in which shard; and reading some."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from torch import Tensor

from uoe_peft.checkpoints import INDEX, SINGLE, TensorFile, opened, read_weight_map, shard_path, torch_dtype


@dataclass(frozen=True)
class StoredTensor:
    """What a shard's header says of a tensor.

    Attributes:
        shard: File name.
        dtype: As stored.
        shape: As stored.
    """

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read, and none of its weights.

    Attributes:
        name: A folder, or a name on the Hub.
        folder: Where its configuration is.
        revision: On the Hub; None for the newest, and for a folder.
        tensors: Every tensor, by its name on disk.
        sizes_and_times: Of the shards that were there, by name: bytes, and when they were written, in nanoseconds.
    """

    name: str
    folder: Path
    revision: str | None
    tensors: dict[str, StoredTensor]
    sizes_and_times: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, name: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Read the headers of all shards.

        Args:
            name: A folder, or a name on the Hub, of which only small files and headers are read.
            revision: On the Hub.

        Raises:
            ValueError: There are no safetensors weights; a shard is missing, cut off or no such file; the index names
                tensors that its shards do not hold.
        """
        folder = Path(name)
        if folder.is_dir():
            return cls._local(name, folder, None)
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.json", "*.py"]))
        if _is_whole(folder):
            return cls._local(name, folder, revision)
        stored = HfApi().get_safetensors_metadata(str(name), revision=revision).files_metadata
        tensors = {
            tensor: StoredTensor(shard, torch_dtype(info.dtype, name=tensor), tuple(info.shape))
            for shard, metadata in stored.items()
            for tensor, info in metadata.tensors.items()
        }
        checkpoint = cls(str(name), folder, revision, tensors, {})
        checkpoint._warn_of_little_room()
        return checkpoint

    @classmethod
    def _local(cls, name: str | Path, folder: Path, revision: str | None) -> Checkpoint:
        # Before the headers: what is written in between is told from what was read.
        sizes_and_times = {path.name: _size_and_time(path) for path in folder.glob("*.safetensors")}
        return cls(str(name), folder, revision, _local_tensors(folder), sizes_and_times)

    @property
    def identity(self) -> str:
        """Changes with the checkpoint: the commit on the Hub, or names, sizes and times of a folder's files."""
        is_local = Path(self.name) == self.folder
        files = sorted(self.sizes_and_times.items()) if is_local else self.folder.name
        return hashlib.sha256(repr((self.name, self.revision, files)).encode()).hexdigest()

    def headers(self) -> dict[str, Tensor]:
        """Every tensor without its data, on the meta device."""
        return {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in self.tensors.items()
        }

    @contextmanager
    def slices(self, names: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Tensors that are read when `[...]` is asked of them, while the context lasts.

        Raises:
            ValueError: A shard has gone, been cut off, or been written anew, since the checkpoint was opened.
        """
        by_shard = defaultdict(list)
        for name in names:
            by_shard[self.tensors[name].shard].append(name)
        with ExitStack() as stack:
            found: dict[str, Any] = {}
            for shard, held in by_shard.items():
                self._check_unchanged(shard)
                # Read, not mapped: pages of a mapped file would count as the process' memory until it is closed.
                file = stack.enter_context(opened(self._path(shard), backend="pread"))
                found |= {name: file.get_slice(name) for name in held}
            yield found

    def _warn_of_little_room(self) -> None:
        """Say whether all shards can be downloaded; who needs few of the layers does not need them all."""
        missing = sum(
            stored.num_bytes for stored in self.tensors.values() if not (self.folder / stored.shard).is_file()
        )
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            warnings.warn(
                f"{self.name} has {missing / 2**30:.1f} GiB that are not downloaded yet, and {self.folder} has "
                f"{free / 2**30:.1f} GiB left: passes through all layers will fail; set HF_HOME to a larger disk",
                stacklevel=4,
            )

    def _check_unchanged(self, shard: str) -> None:
        """Layers of two checkpoints would make a model that nobody has trained."""
        path = self.folder / shard
        before = self.sizes_and_times.get(shard)
        if before is not None and (not path.is_file() or _size_and_time(path) != before):
            raise ValueError(
                f"{path} is not the file that it was when the checkpoint was opened; let it be while it is streamed, "
                "and open it again"
            )

    def _path(self, shard: str) -> Path:
        path = self.folder / shard
        return path if path.is_file() else Path(hf_hub_download(self.name, shard, revision=self.revision))


def _size_and_time(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds all shards, which nobody needs to ask the Hub about."""
    if not (folder / INDEX).is_file():
        return (folder / SINGLE).is_file()
    return all((folder / shard).is_file() for shard in set(read_weight_map(folder).values()))


def _local_tensors(folder: Path) -> dict[str, StoredTensor]:
    weight_map = read_weight_map(folder)
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        for name, stored in TensorFile(shard_path(folder, shard)).tensors.items():
            found[name] = StoredTensor(shard, torch_dtype(stored.dtype, name=name), stored.shape)
    absent = sorted(name for name, shard in weight_map.items() if name not in found or found[name].shard != shard)
    if absent:
        raise ValueError(
            f"{INDEX} of {folder} says that {weight_map[absent[0]]} holds {absent[0]}, which it does not (and "
            f"{len(absent) - 1} more such tensors); download or save the checkpoint again"
        )
    return found
