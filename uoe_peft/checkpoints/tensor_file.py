"""Read and name byte ranges of one safetensors file, so that a tensor never has to be in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# As safetensors names them in its headers.
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_PRECISE = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        dtype: As the file names it: "BF16".
        shape: Of the tensor.
        start: Byte of the file at which it starts.
        stop: Byte after its last one.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_precise(self) -> bool:
        """Whether the values can be computed with as they are: floats of at least 16 bits."""
        return self.dtype in _PRECISE

    @property
    def num_rows(self) -> int:
        """Rows of the tensor as a matrix: all its dimensions but the last one."""
        return torch.Size(self.shape[:-1]).numel()

    @property
    def row_bytes(self) -> int:
        """Bytes of such a row."""
        return (self.stop - self.start) // max(self.num_rows, 1)


def torch_dtype(stored: str, *, name: str) -> torch.dtype:
    """The dtype that a header names.

    Args:
        stored: As the header names it: "BF16".
        name: Of the tensor, for the error.

    Raises:
        ValueError: PyTorch has none of this name.
    """
    if stored not in _DTYPES:
        raise ValueError(f"{name} is stored as {stored}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[stored]


class TensorFile:
    """A safetensors file whose tensors are read by rows.

    Args:
        path: The file.

    Raises:
        ValueError: It is cut off, no safetensors file, or not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path):  # it checks the header and that the tensors fill the file
            pass

    @cached_property
    def _header(self) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(size))
        metadata = content.pop("__metadata__", None) or {}
        first = 8 + size
        tensors = {
            name: StoredTensor(
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                start=first + entry["data_offsets"][0],
                stop=first + entry["data_offsets"][1],
            )
            for name, entry in content.items()
        }
        return metadata, tensors

    @property
    def metadata(self) -> dict[str, str]:
        """What the header says beside the tensors."""
        return self._header[0]

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the file, by name."""
        return self._header[1]

    def read_rows(self, name: str, rows: range | None = None) -> Tensor:
        """Rows of a tensor as a matrix, whose rows are all its dimensions but the last one.

        Args:
            name: Of the tensor.
            rows: Which of them, in steps of any size >= 1; None: all.

        Returns:
            A copy. Shape `(len(rows), width)`.

        Raises:
            ValueError: Its numbers cannot be computed with, such as 8-bit floats.
        """
        stored = self.tensors[name]
        rows = range(stored.num_rows) if rows is None else rows
        if not stored.is_precise:
            raise ValueError(
                f"{name} in {self.path} is stored as {stored.dtype}; expected one of {', '.join(_PRECISE)}"
            )
        width = stored.shape[-1]
        if not rows:
            return torch.empty(0, width, dtype=_DTYPES[stored.dtype])
        with self.path.open("rb") as file:
            raw = read_bytes(
                file, stored.start + rows[0] * stored.row_bytes, (rows[-1] - rows[0] + 1) * stored.row_bytes
            )
        return torch.frombuffer(raw, dtype=_DTYPES[stored.dtype]).view(-1, width)[:: rows.step]


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Any]:
    """A safetensors file, opened by the library itself.

    Args:
        path: The file.
        **options: Of `safe_open`.

    Raises:
        ValueError: It is cut off, no safetensors file, or cannot be opened.
    """
    try:
        file = safe_open(path, framework="pt", **options)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it may have been cut off: download or save it again"
        ) from error
    with file:
        yield file


def read_bytes(file: BinaryIO, start: int, size: int) -> bytearray:
    """Exactly `size` bytes of a file from `start` on.

    Raises:
        ValueError: The file ends before.
    """
    raw = bytearray(size)
    file.seek(start)
    if file.readinto(raw) != size:  # type: ignore[attr-defined]
        raise ValueError(f"{file.name} ends before byte {start + size}: it has been cut off while it was read")
    return raw


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them."""
    return cast(Any, tensor.contiguous().flatten().view(torch.uint8).numpy()).data
