"""Hidden states of token sequences in a memory-mapped file.

A store is two files: `<key>.states`, the states of all tokens one after the other, without padding, in their own dtype;
and `<key>.json`, which says where each sequence lies. The second is written last: where it is, the first is complete.

Letters: N tokens of all sequences together, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FORMAT = 1
# What must stay free beside the states, for checkpoints and logs.
_SPARE_BYTES = 64 << 20


class PrefixCacheUnavailable(ValueError):
    """A prefix cache cannot be had for this model, these data or this machine; the message says why."""


class NothingToCache(PrefixCacheUnavailable):
    """Training has nothing to gain from a prefix cache."""


@dataclass(frozen=True)
class StateFolder:
    """Where stores are kept.

    Attributes:
        path: The folder; it is made when the first store is written.
        is_fresh: Whether it was made for this training, so that nothing in it can be stale.
        turns: Makes a context that lets one process of a machine go first; the others then find what it wrote.
    """

    path: Path
    is_fresh: bool = False
    turns: Callable[[], AbstractContextManager[Any]] = nullcontext

    def in_turn(self, find_or_write: Callable[[], T]) -> T:
        """What `find_or_write` returns, called when it is this process's turn.

        Raises:
            PrefixCacheUnavailable: As `find_or_write` does, but after the others have had their turn, who would else
                wait for it.
        """
        with self.turns():
            try:
                return find_or_write()
            except PrefixCacheUnavailable as error:
                refused = error
        raise refused


@dataclass(frozen=True, eq=False)
class StateStore:
    """States of many token sequences.

    Attributes:
        values: States of all tokens, read from disk when they are needed. Shape `(N, ...)`: `(N, H)` for most models.
        spans: First token and number of tokens of each sequence, by `sequence_digest`.
    """

    values: Tensor
    spans: dict[str, tuple[int, int]]

    def states(self, digest: str) -> Tensor | None:
        """States of a sequence, shape `(its tokens, ...)`; None if it is not here."""
        span = self.spans.get(digest)
        return None if span is None else self.values[span[0] : span[0] + span[1]]


def sequence_digest(token_ids: Sequence[int] | Tensor) -> str:
    """What a sequence of tokens is found by."""
    array = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else np.asarray(token_ids)
    return hashlib.blake2b(array.astype("<i8").tobytes(), digest_size=16).hexdigest()


def open_store(directory: Path, key: str) -> StateStore | None:
    """The store of a key, or None where there is none, or none that is complete."""
    header = _header_path(directory, key)
    if not header.exists():
        return None
    try:
        described = json.loads(header.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        logger.warning("prefix cache %s cannot be read; it is computed anew", header)
        return None
    dtype, shape = getattr(torch, described["dtype"]), tuple(described["shape"])
    states = _states_path(directory, key)
    expected = dtype.itemsize * math.prod(shape)
    found = states.stat().st_size if states.exists() else 0
    if described["format"] != _FORMAT or found != expected:
        logger.warning("prefix cache %s has %d bytes instead of %d; it is computed anew", states, found, expected)
        return None
    values = map_file(states, dtype, shape)
    return StateStore(values, {name: (start, length) for name, start, length in described["spans"]})


def write_store(
    directory: Path, key: str, sequences: Iterable[tuple[str, Tensor]], *, num_tokens: int, row: Tensor
) -> StateStore:
    """Write a store, and open it.

    A process that ends in the middle leaves a file that is never read; the next writer on this machine removes it.

    Args:
        directory: Where; it is made if it is not there.
        key: Name of the store: whatever the states depend on must be in it.
        sequences: Digest and states, shape `(its tokens, ...)`, of each sequence.
        num_tokens: N.
        row: A state like those to come. Shape `(...)`.

    Raises:
        PrefixCacheUnavailable: The disk has no room for it.
        ValueError: `sequences` have other than N tokens.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _discard_unfinished(directory)
    check_room(directory, num_tokens * row.numel() * row.element_size())
    unfinished = _unfinished_path(directory, key)
    spans: list[tuple[str, int, int]] = []
    written = 0
    try:
        with unfinished.open("xb") as file:
            for digest, states in sequences:
                spans.append((digest, written, len(states)))
                written += len(states)
                file.write(raw_bytes(states.to(row.dtype)))
            file.flush()
            os.fsync(file.fileno())
        if written != num_tokens:
            raise ValueError(f"expected states of {num_tokens} tokens, got {written}")
        os.replace(unfinished, _states_path(directory, key))
    finally:
        unfinished.unlink(missing_ok=True)
    _write_header(directory, key, (num_tokens, *row.shape), row.dtype, spans)
    store = open_store(directory, key)
    assert store is not None
    return store


def _write_header(
    directory: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype, spans: list[tuple[str, int, int]]
) -> None:
    described: dict[str, Any] = {"format": _FORMAT, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    unfinished = _unfinished_path(directory, key)
    unfinished.write_text(json.dumps(described | {"spans": spans}), encoding="utf-8")
    os.replace(unfinished, _header_path(directory, key))


def check_room(directory: Path, size: int, *, what: str = "the prefix cache") -> None:
    """Announce that bytes will be written.

    Raises:
        PrefixCacheUnavailable: The disk has no room for them.
    """
    free = shutil.disk_usage(directory).free
    if size + _SPARE_BYTES > free:
        raise PrefixCacheUnavailable(
            f"{what} needs {size / 1e6:,.0f} MB, and {directory} has {free / 1e6:,.0f} MB free; pass a "
            "prefix_cache_dir on another disk, or prefix_cache=False"
        )
    logger.info("%s: writing %s MB to %s", what.removeprefix("the "), f"{size / 1e6:,.1f}", directory)


def _discard_unfinished(directory: Path) -> None:
    """Remove what processes that have ended left behind; processes of other machines cannot be asked."""
    for path in directory.glob(f"*.{_this_machine()}-*.partial"):
        pid = path.stem.split("-")[-2]
        if os.name == "posix" and pid.isdigit() and not _is_running(int(pid)):
            logger.warning("removing %s, which a process left unfinished", path)
            path.unlink(missing_ok=True)


def _unfinished_path(directory: Path, key: str) -> Path:
    """A name that no other process has, on this machine or another that shares the folder."""
    return directory / f"{key}.{_this_machine()}-{os.getpid()}-{uuid.uuid4().hex}.partial"


def _this_machine() -> str:
    return hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor, as a file has them."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def map_file(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose values are read from a file when they are needed; writing to it does not change the file."""
    return torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype).view(shape)


def _states_path(directory: Path, key: str) -> Path:
    return directory / f"{key}.states"


def _header_path(directory: Path, key: str) -> Path:
    return directory / f"{key}.json"
