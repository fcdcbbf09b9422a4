"""What enters a decoder layer, of many passes: in memory, or in files, from which a later process can go on.

A sweep takes all passes through one layer. In a folder its states are written beside those of the sweep before it, and
count once a small file says so: whenever the process ends, one whole set of states is there.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from uoe_peft.checkpoints import why_not_writable
from uoe_peft.moe.segments import LayerState

_PROGRESS = "progress.json"
_NEXT_PROGRESS = f"{_PROGRESS}.new"


class States:
    """States of many passes, after the layer that they went through last.

    Args:
        limit: Bytes of states that may be in memory; others are in temporary files.
        folder: Where each sweep is kept for a later process; None: nowhere.
        key: Names what is computed: a folder with another key is begun anew.
    """

    def __init__(self, *, limit: int, folder: Path | None, key: str) -> None:
        self._limit, self._folder, self._key = limit, folder, key
        self._memory: dict[int, LayerState] = {}
        self._in_memory = 0
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._read_from: Path | None = None
        self._write_to: Path | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def all_of(self, num_passes: int) -> dict[int, LayerState] | None:
        """The states of all passes; None where some are not in memory."""
        return dict(self._memory) if len(self._memory) == num_passes and self._folder is None else None

    def begin_from(self, states: dict[int, LayerState]) -> None:
        """Have states in memory that were there before."""
        self._memory = dict(states)
        self._in_memory = sum(map(num_bytes, states.values()))

    def check_room(self, num_bytes: int) -> None:
        """Whether the disk has room for states of a size.

        Raises:
            ValueError: It has not.
        """
        place, needed = (tempfile.gettempdir(), num_bytes - self._limit)
        if self._folder is not None:
            place, needed = (str(self._folder), 2 * num_bytes)  # a sweep, and the one before it
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"hidden states take {needed / 2**30:.1f} GiB in {place}, which has {free / 2**30:.1f} GiB left; "
                "pass fewer tokens (max_tokens), or open the model with a state_dir on a larger disk"
            )

    def finished(self) -> tuple[int, dict[int, dict[int, Tensor]]]:
        """The last layer that an earlier process took all passes through, and what it read by layer and position.

        The layer is -1 where there is none.
        """
        if self._folder is None:
            return -1, {}
        progress = _read_json(self._folder / _PROGRESS)
        if progress.get("key") != self._key:
            self.remove()
            return -1, {}
        layer_idx = int(progress["layer_idx"])
        self._read_from = self._folder / f"layer-{layer_idx}"
        readings = {index: _load(self._folder / f"readings-{index}.pt") for index in progress["readings"]}
        return layer_idx, readings

    def begin(self, layer_idx: int) -> None:
        """From now on :meth:`put` writes what comes out of a layer."""
        if self._folder is not None:
            self._write_to = self._folder / f"layer-{layer_idx}"
            self._write_to.mkdir(exist_ok=True)

    def get(self, position: int) -> LayerState:
        """The state of a pass, as it entered the layer that was begun."""
        if position in self._memory:
            return self._memory[position]
        return cast(LayerState, _load((self._read_from or self._overflow()) / f"{position}.pt"))

    def put(self, position: int, state: LayerState) -> None:
        """Set the state of a pass."""
        if self._write_to is None:
            self._in_memory -= num_bytes(self._memory.pop(position, ()))
            if self._in_memory + num_bytes(state) <= self._limit:
                self._in_memory += num_bytes(state)
                self._memory[position] = state
                return
        _save(state, (self._write_to or self._overflow()) / f"{position}.pt")

    def finish(self, layer_idx: int, readings: dict[int, dict[int, Tensor]] | None) -> None:
        """Note that every pass has gone through a layer.

        Args:
            layer_idx: The layer.
            readings: What was read so far, by layer and position; None where that is not all that a later process would
                need: it then begins anew.
        """
        if self._folder is None:
            return
        if readings is None:
            (self._folder / _PROGRESS).unlink(missing_ok=True)
        else:
            self._note(layer_idx, readings)
        before, self._read_from = self._read_from, self._write_to
        if before is not None and before != self._read_from:
            shutil.rmtree(before, ignore_errors=True)

    def close(self) -> None:
        """Remove what no later process could go on from."""
        self._memory.clear()
        if self._temporary is not None:
            self._temporary.cleanup()

    def remove(self) -> None:
        """Remove what this class has written into the folder, and nothing else: it is the user's."""
        if self._folder is not None:
            for name in (_PROGRESS, _NEXT_PROGRESS):
                (self._folder / name).unlink(missing_ok=True)
            for path in self._folder.glob("layer-*"):
                if path.name.removeprefix("layer-").isdigit():
                    shutil.rmtree(path, ignore_errors=True)
            for path in self._folder.glob("readings-*.pt"):
                if path.stem.removeprefix("readings-").isdigit():
                    path.unlink(missing_ok=True)

    def _note(self, layer_idx: int, readings: dict[int, dict[int, Tensor]]) -> None:
        """Have a later process go on after a layer."""
        assert self._folder is not None
        if layer_idx in readings:
            _save(readings[layer_idx], self._folder / f"readings-{layer_idx}.pt")
        content = {"key": self._key, "layer_idx": layer_idx, "readings": sorted(readings)}
        temporary = self._folder / _NEXT_PROGRESS
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, self._folder / _PROGRESS)

    def _overflow(self) -> Path:
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="uoe-states-", ignore_cleanup_errors=True)
        return Path(self._temporary.name)


class Entered:
    """What entered the lowest edited layer, of passes that are run again when its adapter has changed.

    Args:
        limit: Bytes of memory; what was put in first makes room.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[str, tuple[int, dict[int, LayerState]]] = {}

    def put(self, key: str, layer_idx: int, states: dict[int, LayerState]) -> None:
        """Keep what entered a layer, if there is room; the key names what is computed below it."""
        self._kept[key] = layer_idx, states
        while self._num_bytes() > self._limit:
            del self._kept[next(iter(self._kept))]

    def get(self, key: str) -> tuple[int, dict[int, LayerState]] | None:
        """The layer, and what entered it; None if that is not known."""
        return self._kept.get(key)

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()

    def _num_bytes(self) -> int:
        return sum(num_bytes(state) for _, states in self._kept.values() for state in states.values())


def check_folder(folder: Path) -> None:
    """Whether states can be written to a folder, which is made if there is none.

    Raises:
        ValueError: They cannot.
    """
    if reason := why_not_writable(folder):
        raise ValueError(f"state_dir {folder} cannot be written ({reason}); name another folder, or none")


def own_folder(folder: Path) -> Path:
    """Where this one of a group of processes keeps its states: each has passes of its own."""
    is_group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return folder / f"rank-{dist.get_rank()}" if is_group else folder


def num_bytes(state: Any) -> int:
    """Size of the tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.dtype.itemsize
    return sum(num_bytes(part) for part in state) if isinstance(state, Sequence) else 0


def _save(value: Any, path: Path) -> None:
    torch.save(value, path)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({error}); remove its state_dir to begin anew") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
