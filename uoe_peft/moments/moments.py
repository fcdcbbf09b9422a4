"""Moments of what slices are multiplied with, as a result that can be kept: numbers, no text and no token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from uoe_peft.checkpoints import read_record

ROUTER = "router"
_FORMAT = "uoe_peft.moments/1"
_PARTS = ("mean", "second")


class SliceName(NamedTuple):
    """Which matrix of a model is meant.

    Attributes:
        layer_idx: The decoder layer's own index.
        expert_idx: The expert; None for the router.
        projection: The matrix, by the name that the experts module uses; "router" for the router.
    """

    layer_idx: int
    expert_idx: int | None
    projection: str

    def __str__(self) -> str:
        owner = "" if self.expert_idx is None else f"expert {self.expert_idx}, "
        return f"layer {self.layer_idx}, {owner}{self.projection}"


@dataclass(frozen=True, eq=False)
class SliceMoments:
    """Moments of what one slice was multiplied with, over the tokens that reached it.

    With a_t the input, of size d, and w_t what the layer multiplies the expert's output by (1 for a router):

    Attributes:
        mean: `1/N Σ w_t a_t`. Shape `(d,)`, float32.
        second: `C = 1/N Σ w_t² a_t a_tᵀ`. Shape `(d, d)`, float32, symmetric.
        num_tokens: N, at least 1.
    """

    mean: Tensor
    second: Tensor
    num_tokens: int

    @property
    def dimension(self) -> int:
        """Input size of the slice, d."""
        return len(self.second)

    @property
    def mean_eigenvalue(self) -> float:
        """`tr(C) / d`."""
        return float(self.second.diagonal().double().mean())


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of single slices over one set.

    Attributes:
        slices: The moments of each slice.
        num_tokens: Tokens that were read, padding not counted, whether they reached a slice or not.
    """

    slices: Mapping[SliceName, SliceMoments]
    num_tokens: int

    def save(self, path: str | Path) -> None:
        """Write them to a safetensors file."""
        names = list(self.slices)
        tensors = {
            f"{place}.{part}": getattr(self.slices[name], part).contiguous().cpu()
            for place, name in enumerate(names)
            for part in _PARTS
        }
        header = {
            "num_tokens": self.num_tokens,
            "slices": [[*name, self.slices[name].num_tokens] for name in names],
        }
        save_file(tensors, str(path), metadata={"format": _FORMAT, "moments": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no such file, is truncated, or holds values that are not finite.
        """
        metadata, tensors = read_record(path, kind=_FORMAT, writer="Moments.save")
        header = json.loads(metadata["moments"])
        slices = {}
        for place, (layer_idx, expert_idx, projection, num_tokens) in enumerate(header["slices"]):
            name = SliceName(layer_idx, expert_idx, projection)
            mean, second = (tensors[f"{place}.{part}"] for part in _PARTS)
            if not (mean.isfinite().all() and second.isfinite().all()):
                raise ValueError(f"{path} holds NaN or infinite moments of {name}; measure them again")
            slices[name] = SliceMoments(mean, second, num_tokens)
        return cls(slices, header["num_tokens"])
