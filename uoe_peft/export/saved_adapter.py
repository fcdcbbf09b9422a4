"""A saved UOE adapter, read without a model: which slices it edits, and by how much.

Letters: M edited experts of a module, R rank.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig
from torch import Tensor

from uoe_peft.checkpoints import TensorFile
from uoe_peft.tuner import UOEConfig

WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.uoe_(?P<part>delta|A|B)\.(?P<projection>[^.]+)")

Part = Literal["delta", "A", "B"]


@dataclass(frozen=True)
class SavedDelta:
    """The deltas of one projection of one module.

    Attributes:
        file: The adapter's weights.
        keys: The tensors: `{"delta": name}` of shape `(M, rows, columns)`, or `{"A": name, "B": name}` of shapes
            `(M, R, in)` and `(M, out, R)`.
        scale: What the delta is multiplied with.
    """

    file: TensorFile
    keys: Mapping[str, str]
    scale: float

    @property
    def is_low_rank(self) -> bool:
        """Whether it is a product of factors."""
        return "delta" not in self.keys

    @property
    def num_slices(self) -> int:
        """M."""
        return self._shape("B" if self.is_low_rank else "delta")[0]

    @property
    def rank(self) -> int:
        """R; of a full delta the most that it can have."""
        return self._shape("A")[1] if self.is_low_rank else min(self._shape("delta")[1:])

    def slice_shape(self, *, transposed: bool) -> tuple[int, int]:
        """Rows and columns of the slices that it fits. Args: transposed: whether these are stored as `(in, out)`."""
        if not self.is_low_rank:
            return self._shape("delta")[1], self._shape("delta")[2]
        out, into = self._shape("B")[1], self._shape("A")[2]
        return (into, out) if transposed else (out, into)

    def factors(self, position: int, *, transposed: bool) -> tuple[Tensor, Tensor]:
        """Factors whose product is the unscaled low-rank delta of one slice. Shapes `(rows, R)` and `(R, columns)`."""
        factor_a, factor_b = (self._read(part, position) for part in ("A", "B"))
        return (factor_a.T, factor_b.T) if transposed else (factor_b, factor_a)

    def rows(self, position: int, rows: range | None = None) -> Tensor:
        """Rows of the unscaled full delta of one slice. Shape `(len(rows), columns)`."""
        return self._read("delta", position, rows)

    def dense(self, position: int, *, transposed: bool) -> Tensor:
        """The scaled delta of one slice in float32, in the layout of the slice."""
        if not self.is_low_rank:
            return self.rows(position).float() * self.scale
        left, right = self.factors(position, transposed=transposed)
        return (left.float() @ right.float()) * self.scale

    def _shape(self, part: str) -> tuple[int, ...]:
        return self.file.tensors[self.keys[part]].shape

    def _read(self, part: str, position: int, rows: range | None = None) -> Tensor:
        size = self._shape(part)[1]
        rows = range(size) if rows is None else rows
        first = position * size
        return self.file.read_rows(self.keys[part], range(rows.start + first, rows.stop + first, rows.step))


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter on disk.

    Attributes:
        name: What it was asked for by.
        config: Of the adapter.
        deltas: By path of the edited module and projection.
    """

    name: str
    config: UOEConfig
    deltas: Mapping[tuple[str, str], SavedDelta]

    @classmethod
    def open(cls, name: str | Path) -> SavedAdapter:
        """Read an adapter's configuration and the header of its weights.

        Args:
            name: Its folder, or its name on the Hub.

        Raises:
            ValueError: There is no UOE adapter; or it holds more than deltas, or values that are cut off.
        """
        config = read_config(name)
        file = TensorFile(_weights(name))
        parts: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        others = []
        for key in file.tensors:
            match = _KEY.fullmatch(key)
            if match is None:
                others.append(key)
            else:
                parts[match["module"], match["projection"]][match["part"]] = key
        if others or config.modules_to_save:
            raise ValueError(
                f"{name} holds more than deltas of slices: modules_to_save={config.modules_to_save}, "
                f"{sorted(others)[:4]}; load it onto the model and use merge_and_unload().save_pretrained(...)"
            )
        deltas = {place: SavedDelta(file, keys, _scale(config, keys)) for place, keys in parts.items()}
        for place, delta in deltas.items():
            _check_parts(place, delta)
        return cls(str(name), config, deltas)


def read_config(name: str | Path) -> UOEConfig:
    """The configuration of a saved adapter.

    Args:
        name: Its folder, or its name on the Hub.

    Raises:
        ValueError: There is no adapter, or it is of another kind.
    """
    try:
        config = PeftConfig.from_pretrained(str(name))
    except (ValueError, OSError) as error:  # absent, offline, no such name, no JSON: each with a type of its own
        raise ValueError(
            f"there is no adapter at {name} ({' '.join(str(error).split())[:120]}); pass the folder that "
            "save_pretrained wrote, with its adapter_config.json, or a name on the Hub"
        ) from error
    if not isinstance(config, UOEConfig):
        raise ValueError(f"{name} is an adapter of type {config.peft_type}; expected one of UOE")
    return config


def _weights(name: str | Path) -> Path:
    if not Path(name).is_dir():
        return Path(hf_hub_download(str(name), WEIGHTS))
    path = Path(name) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{name} has no {WEIGHTS}; save the adapter with save_pretrained, in safetensors format")
    return path


def _scale(config: UOEConfig, keys: Mapping[str, str]) -> float:
    low_rank = config.uoe_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    return (1.0 if "delta" in keys else low_rank) * getattr(config, "strength", 1.0)


def _check_parts(place: tuple[str, str], delta: SavedDelta) -> None:
    if set(delta.keys) not in ({"delta"}, {"A", "B"}):
        raise ValueError(f"the adapter has {sorted(delta.keys.values())} for {'.'.join(place)}: parts are missing")
    for key in delta.keys.values():
        stored = delta.file.tensors[key]
        if len(stored.shape) != 3 or not stored.is_precise:
            raise ValueError(
                f"{key} has shape {stored.shape} and dtype {stored.dtype}; expected three dimensions, float"
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or not a number."""
    return bool(torch.isfinite(tensor).all())
