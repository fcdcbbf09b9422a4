"""What is in a saved adapter, without its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uoe_peft.export.saved_adapter import SavedAdapter, SavedDelta

_RANK_TOLERANCE = 1e-6  # of the largest singular value
_LARGEST_SVD = 1 << 22  # elements; the rank of a larger delta is not computed


@dataclass(frozen=True)
class DeltaDescription:
    """One slice's delta.

    Attributes:
        module: Path of the edited module.
        projection: Name of the matrix.
        layer_idx: Decoder layer, or None where the path has no number.
        expert_idx: Expert, or None for a router.
        shape: Of the delta: as it is stored, or `(out, in)` of a low-rank one.
        rank: Of a low-rank delta, as it was configured; of a full one, singular values above 1e-6 of the largest;
            None where that was too large to compute.
        norm: Frobenius norm, scale and strength included.
    """

    module: str
    projection: str
    layer_idx: int | None
    expert_idx: int | None
    shape: tuple[int, int]
    rank: int | None
    norm: float


@dataclass(frozen=True)
class AdapterDescription:
    """A saved adapter.

    Attributes:
        name: What it was asked for by.
        base_model: What it says of its base model.
        deltas: Its deltas, by module.
        delta_type: "full" or "low_rank".
        strength: Factor on all deltas.
        num_bytes: Size of the weights.
        attribution: How the experts were chosen, or None.
        provenance: How the adapter came about, or None.
    """

    name: str
    base_model: str | None
    deltas: tuple[DeltaDescription, ...]
    delta_type: str
    strength: float
    num_bytes: int
    attribution: Mapping[str, Any] | None
    provenance: Mapping[str, Any] | None

    def summary(self) -> str:
        """A table, and what is known of the adapter's origin."""
        lines = [
            f"{self.name}: UOE adapter of {self.base_model or 'an unnamed model'}, {self.num_bytes:,} bytes",
            f"deltas {self.delta_type}, strength {self.strength:g}",
            f"{'layer':>5} {'expert':>6} {'rank':>5} {'norm':>9}  {'shape':>14}  matrix",
        ]
        for delta in self.deltas:
            cells = ("-" if cell is None else cell for cell in (delta.layer_idx, delta.expert_idx, delta.rank))
            layer, expert, rank = cells
            expert = "router" if delta.expert_idx is None else expert
            shape = "×".join(map(str, delta.shape))
            lines.append(f"{layer:>5} {expert:>6} {rank:>5} {delta.norm:9.4g}  {shape:>14}  {delta.projection}")
        for title, record in (("attribution", self.attribution), ("provenance", self.provenance)):
            lines += [f"{title}: {json.dumps(record, ensure_ascii=False)}"] if record else []
        return "\n".join(lines)


def describe_adapter(adapter: str | Path) -> AdapterDescription:
    """Describe a saved adapter.

    Args:
        adapter: Its folder, or its name on the Hub.

    Raises:
        ValueError: There is no UOE adapter, or it is cut off.
    """
    saved = SavedAdapter.open(adapter)
    config = saved.config
    deltas = [
        _describe(saved, module, projection, position)
        for (module, projection), delta in sorted(saved.deltas.items())
        for position in range(delta.num_slices)
    ]
    sizes = {delta.file.path: delta.file.path.stat().st_size for delta in saved.deltas.values()}
    return AdapterDescription(
        name=saved.name,
        base_model=config.base_model_name_or_path,
        deltas=tuple(deltas),
        delta_type=config.delta_type,
        strength=getattr(config, "strength", 1.0),
        num_bytes=sum(sizes.values()),
        attribution=_without_tables(config.attribution),
        provenance=config.provenance,
    )


def _describe(saved: SavedAdapter, module: str, projection: str, position: int) -> DeltaDescription:
    delta = saved.deltas[module, projection]
    numbers = [int(part) for part in module.split(".") if part.isdigit()]
    layer_idx = numbers[0] if numbers else None
    dense = delta.dense(position, transposed=False)
    return DeltaDescription(
        module=module,
        projection=projection,
        layer_idx=layer_idx,
        expert_idx=_expert(saved, layer_idx, numbers, delta, projection, position),
        shape=(dense.shape[0], dense.shape[1]),
        rank=_rank(delta, dense),
        norm=float(dense.norm()),
    )


def _expert(
    saved: SavedAdapter, layer_idx: int | None, numbers: list[int], delta: SavedDelta, projection: str, position: int
) -> int | None:
    """The expert of a delta; a module of its own has the expert's number in its path, a router has none."""
    experts = sorted(expert for layer, expert in saved.config.target_experts if layer == layer_idx)
    if len(numbers) > 1:
        return numbers[1]
    is_stack = (saved.config.base_experts or {}).get(str(layer_idx), {}).get("shapes", {projection: None})
    if projection not in is_stack or delta.num_slices != len(experts):
        return None
    return experts[position]


def _rank(delta: SavedDelta, dense: torch.Tensor) -> int | None:
    if delta.is_low_rank:
        return delta.rank
    if dense.numel() > _LARGEST_SVD:
        return None
    singular = torch.linalg.svdvals(dense)
    return int((singular > _RANK_TOLERANCE * singular.max()).sum())


def _without_tables(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The entries of a record that fit on a line."""
    return {key: value for key, value in record.items() if len(str(value)) <= 200} if record else None
