"""Small results of this package as safetensors files that say what they are."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_record(path: str | Path, *, kind: str, writer: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a file's header says, and its tensors.

    Args:
        path: The file.
        kind: What `format` of the header must be.
        writer: The method that writes such files, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is of another kind, or cannot be read, for instance since it was cut off.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; expected a file that {writer} wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from error
    if metadata.get("format") != kind:
        raise ValueError(f"{path} is of format {metadata.get('format')!r}, expected {kind!r} of {writer}")
    return metadata, tensors
