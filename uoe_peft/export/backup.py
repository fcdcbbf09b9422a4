"""The original bytes of what a merge changes, in one small file.

The file is a safetensors file: a tensor of bytes for each changed range, and in its metadata where the range lies and
the hash of what the merge has put there. It holds what was forgotten.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from uoe_peft.checkpoints import TensorFile, read_bytes
from uoe_peft.export.checkpoint import Checkpoint
from uoe_peft.export.edits import TensorEdit
from uoe_peft.export.rewriting import Patch

FILE = "original_slices.safetensors"
_FORMAT = "uoe_peft.original_slices"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Backup:
    """Original slices of a checkpoint.

    Attributes:
        file: Their bytes.
        edits: What the merge changed, in the order of the file's tensors, which are named `0`, `1`, ...
        merged: SHA-256 of what the merge put there, for each edit.
    """

    file: TensorFile
    edits: tuple[TensorEdit, ...]
    merged: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> Backup:
        """Read a backup's header.

        Raises:
            ValueError: The folder holds no whole backup.
        """
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} has no {FILE}; pass the folder that merge_checkpoint was given as backup")
        file = TensorFile(folder / FILE)
        if file.metadata.get("format") != _FORMAT:
            raise ValueError(f"{folder / FILE} is not a backup: expected the format {_FORMAT!r} in its metadata")
        entries = json.loads(file.metadata["slices"])
        hashes = tuple(entry.pop("merged") for entry in entries)
        return cls(file, tuple(TensorEdit(**entry) for entry in entries), hashes)

    def restore(self, checkpoint: Checkpoint) -> tuple[list[TensorEdit], dict[str, list[Patch]]]:
        """What to write where to undo the merge.

        Raises:
            ValueError: The checkpoint is not what the merge wrote.
        """
        patches = defaultdict(list)
        for index, (edit, merged) in enumerate(zip(self.edits, self.merged, strict=True)):
            if checkpoint.weight_map.get(edit.tensor) != edit.shard or _hash_in(checkpoint, edit) != merged:
                raise ValueError(
                    f"{edit.tensor} of {checkpoint.name} is not what the merge wrote: the backup {self.file.path} is "
                    "of another checkpoint, or the merge was undone already"
                )
            patches[edit.shard].append(Patch(edit.start, edit.num_bytes, partial(self.original, index)))
        return list(self.edits), dict(patches)

    def original(self, index: int) -> Iterator[bytearray]:
        """The bytes of an edit before the merge, part by part."""
        stored = self.file.tensors[str(index)]
        with self.file.path.open("rb") as file:
            yield from _ranges(file, stored.start, stored.stop - stored.start)


def write_backup(folder: Path, checkpoint: Checkpoint, edits: Iterable[TensorEdit], *, merged: Path) -> Path:
    """Write the original bytes of what a merge changed.

    Args:
        folder: Where to; made if it does not exist.
        checkpoint: Before the merge.
        edits: What was changed.
        merged: Folder with the rewritten shards.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    edits = list(edits)
    entries = []
    for edit in edits:
        with (merged / edit.shard).open("rb") as file:
            entries.append({**asdict(edit), "merged": _hash(_ranges(file, edit.start, edit.num_bytes))})
    unfinished = folder / f".{FILE}.partial"  # of one name: the next try replaces what a killed one has left
    try:
        with unfinished.open("wb") as target:
            target.write(_header(entries))
            for edit in edits:
                with checkpoint.shard(edit.shard).path.open("rb") as source:
                    for block in _ranges(source, edit.start, edit.num_bytes):
                        target.write(block)
            target.flush()
            os.fsync(target.fileno())
        os.replace(unfinished, folder / FILE)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return folder / FILE


def check_backup(
    folder: Path, checkpoint: Checkpoint, edits: Sequence[TensorEdit], patches: Mapping[str, Sequence[Patch]]
) -> None:
    """Raise ValueError if a folder holds a backup of another merge: it may be the only copy of something.

    One of this very merge may stay: a process that was killed before its output appeared has left it.

    Args:
        folder: Where the backup is to be written.
        checkpoint: Before the merge.
        edits: What is to be changed.
        patches: The new bytes, by shard.
    """
    if (folder / FILE).exists() and not _is_of(folder, checkpoint, edits, patches):
        raise ValueError(f"backup {folder} holds {FILE} of an earlier merge; choose another folder")


def _is_of(
    folder: Path, checkpoint: Checkpoint, edits: Sequence[TensorEdit], patches: Mapping[str, Sequence[Patch]]
) -> bool:
    try:
        backup = Backup.open(folder)
    except (ValueError, KeyError, TypeError):
        return False
    if backup.edits != tuple(edits):
        return False
    new = {(shard, patch.start): patch for shard, group in patches.items() for patch in group}
    for index, edit in enumerate(edits):
        merged, kept = _hash(new[edit.shard, edit.start].blocks()), _hash(backup.original(index))
        if (merged, kept) != (backup.merged[index], _hash_in(checkpoint, edit)):
            return False
    return True


def _header(entries: list[dict[str, object]]) -> bytes:
    """The header of a safetensors file with a tensor of bytes for each entry."""
    content: dict[str, object] = {"__metadata__": {"format": _FORMAT, "version": "1", "slices": json.dumps(entries)}}
    offset = 0
    for index, entry in enumerate(entries):
        size = int(str(entry["num_bytes"]))
        content[str(index)] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _hash_in(checkpoint: Checkpoint, edit: TensorEdit) -> str | None:
    path = checkpoint.shard(edit.shard).path
    if path.stat().st_size < edit.start + edit.num_bytes:
        return None
    with path.open("rb") as file:
        return _hash(_ranges(file, edit.start, edit.num_bytes))


def _hash(blocks: Iterable[bytes | bytearray | memoryview]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _ranges(file: BinaryIO, start: int, size: int) -> Iterator[bytearray]:
    for offset in range(0, size, _CHUNK):
        yield read_bytes(file, start + offset, min(_CHUNK, size - offset))
