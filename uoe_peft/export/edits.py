"""What an adapter changes in a checkpoint: which bytes of which tensor, and their new values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from uoe_peft.checkpoints import as_bytes
from uoe_peft.export.checkpoint import Checkpoint
from uoe_peft.export.disk_layout import DiskPiece, MemorySlice, as_in_memory, disk_pieces
from uoe_peft.export.rewriting import Patch
from uoe_peft.export.saved_adapter import SavedAdapter, SavedDelta, all_finite
from uoe_peft.moe import ListedExperts, MoEBlock, find_moe_blocks

_BLOCK = 1 << 18  # elements that are computed at once, as in a merge in memory


@dataclass(frozen=True)
class SliceEdit:
    """The delta of one slice of a model.

    Attributes:
        layer_idx: Decoder layer.
        expert_idx: Expert, or None for the layer's router.
        projection: Name of the matrix.
        target: Where the slice is in the model.
        transposed: Whether the slice is stored as `(in, out)`.
        delta: The deltas of this projection.
        position: Which of them.
    """

    layer_idx: int
    expert_idx: int | None
    projection: str
    target: MemorySlice
    transposed: bool
    delta: SavedDelta
    position: int

    def apply(self, base: Tensor, rows: range, columns: range) -> Tensor:
        """A part of the slice with the delta added in float32 and rounded once, as merging in memory does it.

        Args:
            base: The part. Shape `(len(rows), len(columns))`.
            rows: Its rows in the slice.
            columns: Its columns in the slice.

        Raises:
            ValueError: The sum is not finite.
        """
        precise = torch.promote_types(base.dtype, torch.float32)
        scale, across = self.delta.scale, slice(columns.start, columns.stop, columns.step)
        if self.delta.is_low_rank:
            left, right = self.delta.factors(self.position, transposed=self.transposed)
            left, right = left[rows.start : rows.stop : rows.step].to(precise), right[:, across].to(precise)
            total = torch.addmm(base.to(precise), left, right, alpha=scale)
        else:
            added = self.delta.rows(self.position, rows)[:, across].to(precise)
            total = base.to(precise) + (added if scale == 1 else added * scale)
        edited = total.to(base.dtype)
        if not all_finite(edited):
            raise ValueError(
                f"NaNs detected in the merged weights of {self.target.parameter}. The adapter seems to be broken"
            )
        return edited


@dataclass(frozen=True)
class TensorEdit:
    """What changes in one tensor of a checkpoint.

    Attributes:
        tensor: Its name.
        shard: Its file.
        num_bytes: How many of its bytes are written anew.
        start: First of them in the file.
    """

    tensor: str
    shard: str
    num_bytes: int
    start: int


def slice_edits(adapter: SavedAdapter, model: PreTrainedModel) -> list[SliceEdit]:
    """Every slice that an adapter edits.

    Args:
        adapter: The adapter.
        model: The model it is for, with weights or without.

    Raises:
        ValueError: The adapter was made for another model, or deltas are missing.
    """
    config, blocks = adapter.config, {block.layer_idx: block for block in find_moe_blocks(model)}
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer_idx, expert_idx in config.target_experts:
        by_layer[layer_idx].append(expert_idx)
    edits: list[SliceEdit] = []
    for layer_idx in sorted(by_layer):
        if layer_idx not in blocks:
            raise _other_model(adapter, f"layer {layer_idx} has experts", f"the layers {sorted(blocks)} have some")
        block = blocks[layer_idx]
        _check_counts(adapter, block)
        edits += _expert_edits(adapter, block, by_layer[layer_idx])
        edits += [_router_edit(adapter, block)] if config.train_router else []
    unknown = set(adapter.deltas) - {_place(edit, blocks) for edit in edits}
    if unknown:
        raise _other_model(adapter, f"deltas of {sorted('.'.join(p) for p in unknown)[:3]}", "no such slices")
    for edit in edits:
        _check_shape(adapter, edit)
    return edits


def _expert_edits(adapter: SavedAdapter, block: MoEBlock, experts: list[int]) -> Iterator[SliceEdit]:
    storage = block.storage
    for projection in adapter.config.target_projections or storage.projections:
        if projection not in storage.projections:
            raise _other_model(
                adapter, f"a projection {projection!r}", f"{block.experts_name} has {storage.projections}"
            )
        for position, expert_idx in enumerate(sorted(experts)):
            listed = isinstance(storage, ListedExperts)  # then every matrix is a module of its own
            place = _expert_place(block, projection, expert_idx)
            yield SliceEdit(
                layer_idx=block.layer_idx,
                expert_idx=expert_idx,
                projection=projection,
                target=expert_slice(block, projection, expert_idx),
                transposed=storage.is_transposed(projection),
                delta=_delta(adapter, place, num_slices=1 if listed else len(experts)),
                position=0 if listed else position,
            )


def expert_slice(block: MoEBlock, projection: str, expert_idx: int) -> MemorySlice:
    """Where a slice is: stacks hold the experts' matrices one after the other, whatever their dimensions."""
    storage = block.storage
    parameter = storage.parameter(projection, expert_idx)
    ((own_name),) = (name for name, p in storage.module.named_parameters() if p is parameter)
    rows = storage.shape(projection)[0]
    first_row = 0 if isinstance(storage, ListedExperts) else expert_idx * rows
    return MemorySlice(f"{block.experts_name}.{own_name}", first_row, storage.shape(projection))


def _router_edit(adapter: SavedAdapter, block: MoEBlock) -> SliceEdit:
    if block.gate_name is None:
        raise _other_model(adapter, f"a router in layer {block.layer_idx}", "every token uses all experts")
    places = [place for place in adapter.deltas if place[0] == block.router_name]
    place = places[0] if places else (block.router_name, block.gate_name)
    rows, columns = block.router.get_parameter(block.gate_name).shape
    return SliceEdit(
        layer_idx=block.layer_idx,
        expert_idx=None,
        projection=place[1],
        target=MemorySlice(f"{block.router_name}.{block.gate_name}", 0, (rows, columns)),
        transposed=False,
        delta=_delta(adapter, place, num_slices=1),
        position=0,
    )


def _place(edit: SliceEdit, blocks: Mapping[int, MoEBlock]) -> tuple[str, str]:
    block = blocks[edit.layer_idx]
    if edit.expert_idx is None:
        return block.router_name, edit.projection
    return _expert_place(block, edit.projection, edit.expert_idx)


def _expert_place(block: MoEBlock, projection: str, expert_idx: int) -> tuple[str, str]:
    if isinstance(block.storage, ListedExperts):
        return f"{block.experts_name}.{block.storage.linear_name(projection, expert_idx)}", "weight"
    return block.experts_name, projection


def _delta(adapter: SavedAdapter, place: tuple[str, str], *, num_slices: int) -> SavedDelta:
    delta = adapter.deltas.get(place)
    if delta is None or delta.num_slices != num_slices:
        have = "none" if delta is None else f"{delta.num_slices}"
        raise ValueError(
            f"{adapter.name} should hold {num_slices} deltas of {'.'.join(place)}, as its configuration says, "
            f"and has {have}; save the adapter again, or pass the model that it was made for"
        )
    return delta


def _check_counts(adapter: SavedAdapter, block: MoEBlock) -> None:
    expected = (adapter.config.base_experts or {}).get(str(block.layer_idx), {}).get("num_experts", block.num_experts)
    highest = max((e for layer_idx, e in adapter.config.target_experts if layer_idx == block.layer_idx), default=0)
    neurons = (adapter.config.base_experts or {}).get(str(block.layer_idx), {}).get("neurons")
    found = getattr(block.storage.module, "neurons_fingerprint", None)
    if neurons != found:
        raise _other_model(adapter, f"groups of neurons {neurons} in layer {block.layer_idx}", f"they are {found}")
    if expected != block.num_experts or highest >= block.num_experts:
        wanted = expected if expected != block.num_experts else f"more than {highest}"
        raise _other_model(adapter, f"{wanted} experts in layer {block.layer_idx}", f"it has {block.num_experts}")


def _check_shape(adapter: SavedAdapter, edit: SliceEdit) -> None:
    given = edit.delta.slice_shape(transposed=edit.transposed)
    if given != edit.target.shape:
        raise _other_model(adapter, f"shape {given} for {edit.target.parameter}", f"its slices are {edit.target.shape}")


def _other_model(adapter: SavedAdapter, expected: str, found: str) -> ValueError:
    return ValueError(f"{adapter.name} was made for another model: it expects {expected}; in the given model {found}")


def plan(
    edits: list[SliceEdit], checkpoint: Checkpoint, model: PreTrainedModel
) -> tuple[list[TensorEdit], dict[str, list[Patch]]]:
    """What to write where.

    Args:
        edits: Of the model's slices.
        checkpoint: The checkpoint.
        model: Its model, with weights or without.

    Returns:
        A line for each tensor that changes, and the patches of each shard.

    Raises:
        ValueError: The checkpoint lacks a tensor, or has it in another shape or in numbers that cannot be added to.
    """
    tensors, patches = [], defaultdict(list)
    for edit in edits:
        for piece in located(edit, checkpoint, model):
            change, patch = _change(edit, piece, checkpoint)
            tensors.append(change)
            patches[change.shard].append(patch)
    return tensors, dict(patches)


def located(edit: SliceEdit, checkpoint: Checkpoint, model: PreTrainedModel) -> list[DiskPiece]:
    """The pieces of a slice in a checkpoint.

    Raises:
        ValueError: The checkpoint has no such tensors.
    """
    converted = disk_pieces(model, edit.target)
    for pieces in (converted, as_in_memory(model, edit.target)):
        if all(piece.tensor in checkpoint.weight_map for piece in pieces):
            return pieces
    missing = sorted({piece.tensor for piece in converted} - set(checkpoint.weight_map))
    raise ValueError(
        f"{checkpoint.name} has no tensor {', '.join(missing)}; expected the names that save_pretrained of "
        f"{type(model).__name__} gives: load the model and save it, then merge into that"
    )


def _change(edit: SliceEdit, piece: DiskPiece, checkpoint: Checkpoint) -> tuple[TensorEdit, Patch]:
    stored, shard = checkpoint.tensor(piece.tensor), checkpoint.weight_map[piece.tensor]
    if stored.shape != piece.shape or not stored.is_precise:
        raise ValueError(
            f"{piece.tensor} of {checkpoint.name} is stored as {stored.dtype} of shape {stored.shape}; expected floats "
            f"of at least 16 bits and shape {piece.shape}. Quantised weights cannot be edited: merge into the "
            "checkpoint that they were made from"
        )
    start, size = stored.start + piece.first_row * stored.row_bytes, piece.num_rows * stored.row_bytes
    file = checkpoint.shard(shard)

    def blocks() -> Iterator[memoryview]:
        step = piece.num_rows if piece.transposed else max(1, _BLOCK // stored.shape[-1])
        for first in range(0, piece.num_rows, step):
            stop = min(first + step, piece.num_rows)
            base = file.read_rows(piece.tensor, range(piece.first_row + first, piece.first_row + stop))
            if piece.transposed:
                yield as_bytes(edit.apply(base.T, piece.rows, piece.columns[first:stop]).T)
            else:
                yield as_bytes(edit.apply(base, piece.rows[first:stop], piece.columns))

    return TensorEdit(piece.tensor, shard, size, start), Patch(start, size, blocks)
