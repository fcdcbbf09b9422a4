"""Copies of a checkpoint's shards with some of their bytes replaced."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

_CHUNK = 1 << 20  # bytes that are copied at once


@dataclass(frozen=True)
class Patch:
    """New bytes for a range of a file.

    Attributes:
        start: First byte of the range.
        size: Bytes.
        blocks: Makes the new bytes, part by part.
    """

    start: int
    size: int
    blocks: Callable[[], Iterable[bytes | bytearray | memoryview]]


@dataclass(frozen=True)
class Copied:
    """What became of the shards of a checkpoint.

    Attributes:
        rewritten: SHA-256 of each shard that was written anew.
        linked: Shards that are the base's own files under a second name: never write into them.
        copied: Shards that are copies.
    """

    rewritten: dict[str, str]
    linked: tuple[str, ...]
    copied: tuple[str, ...]


def copy_shards(
    sources: Mapping[str, Path], patches: Mapping[str, Sequence[Patch]], folder: Path, *, link: bool
) -> Copied:
    """Put every shard into a folder: those with patches rewritten, the others linked or copied.

    Whatever is written is read back and compared by hash.

    Args:
        sources: File of each shard.
        patches: For the shards to be rewritten.
        folder: Where to.
        link: Give untouched shards a second name instead of copying them, where the file system can.

    Returns:
        What was done with each.

    Raises:
        OSError: The disk is full, or what was read back is not what was written.
    """
    rewritten: dict[str, str] = {}
    linked, copied = [], []
    for shard, source in tqdm(sources.items(), desc="Writing shards", disable=None, leave=False):
        target = folder / shard
        if shard in patches:
            rewritten[shard] = rewrite(source, target, patches[shard])
        elif link and _link(source, target):
            linked.append(shard)
        else:
            rewrite(source, target, ())
            copied.append(shard)
    return Copied(rewritten, tuple(linked), tuple(copied))


def rewrite(source: Path, target: Path, patches: Iterable[Patch]) -> str:
    """Copy a file with patches, a little at a time, and read the copy back.

    Returns:
        SHA-256 of the copy, in hexadecimal.

    Raises:
        OSError: The copy does not hold what was written.
    """
    intended = hashlib.sha256()
    with source.open("rb") as old, target.open("wb") as new:

        def put(block: bytes | bytearray | memoryview) -> None:
            new.write(block)
            intended.update(block)

        for patch in sorted(patches, key=lambda patch: patch.start):
            _copy(old, put, patch.start - old.tell())
            written = new.tell()
            for block in patch.blocks():
                put(block)
            if new.tell() - written != patch.size:
                raise RuntimeError(f"a patch of {patch.size} bytes has become {new.tell() - written}")
            old.seek(patch.size, os.SEEK_CUR)
        _copy(old, put, source.stat().st_size - old.tell())
        new.flush()
        os.fsync(new.fileno())
    if sha256(target) != intended.hexdigest():
        raise OSError(errno.EIO, "what was read back is not what was written", str(target))
    return intended.hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(old: Any, put: Callable[[bytes], None], size: int) -> None:
    while size:
        block = old.read(min(size, _CHUNK))
        if not block:
            raise OSError(errno.EIO, f"the file ends {size} bytes too early", old.name)
        put(block)
        size -= len(block)


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; False where the file system refuses: another disk, another owner, no such thing."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            return False
        raise
    return True
