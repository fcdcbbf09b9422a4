"""Which tensor of a checkpoint is in which of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath

from uoe_peft.checkpoints.tensor_file import TensorFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_weight_map(folder: Path) -> dict[str, str]:
    """The shard of each tensor of a checkpoint in a folder.

    Raises:
        ValueError: There are no safetensors weights; the index is missing, cannot be read, or names files elsewhere.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(TensorFile(folder / SINGLE).tensors, SINGLE)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise ValueError(f"{folder} has the shards {shards[:3]} but no {INDEX}; download or save the checkpoint again")
    raise ValueError(f"{folder} has no {SINGLE} and no {INDEX}: expected a checkpoint in safetensors format")


def shard_path(folder: Path, shard: str) -> Path:
    """The file of a shard. Raises ValueError if it is not in the folder."""
    path = folder / shard
    if not path.is_file():
        raise ValueError(f"{folder} has no {shard}, which its {INDEX} names; download the checkpoint again")
    return path


def _indexed(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, TypeError, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise ValueError(f"{path} cannot be read ({error!r}); download the checkpoint again") from error
    if not isinstance(weight_map, Mapping) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{path} cannot be read (its weight_map is no table of names); download the checkpoint again")
    outside = sorted(shard for shard in set(weight_map.values()) if PurePath(shard).name != shard or shard == "..")
    if outside:  # a foreign index must not say where files are read and written
        raise ValueError(f"{path} names {outside[0]!r}; expected names of files beside it, without folders")
    return dict(weight_map)
