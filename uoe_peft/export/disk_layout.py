"""Where the slices of a model lie in its checkpoint, found by asking transformers' own weight conversion.

A checkpoint names and cuts tensors in its own way: `gate_up_proj (E, 2I, H)` in memory is `experts.3.gate_proj.weight`
and `experts.3.up_proj.weight` on disk in one family, `input_linear.weight (E, 2I, H)` in another. The conversion that
`save_pretrained` uses is run on two small probes, one that counts rows and one that counts columns; where the counts
come out says which bytes of which tensor hold a slice, for any family and without the model's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

_NARROW = 4  # size of the dimension that a probe does not count: conversions halve it, and two must be left


@dataclass(frozen=True)
class MemorySlice:
    """A slice of a parameter, whose dimensions but the last one count as rows.

    Attributes:
        parameter: Path of the parameter in the model.
        first_row: Its first row.
        shape: Rows and columns.
    """

    parameter: str
    first_row: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class DiskPiece:
    """A part of a slice in one tensor of a checkpoint: whole rows of it, one after the other.

    Row `first_row + i`, column `j` of the tensor is row `rows[i]`, column `columns[j]` of the slice; where the piece is
    `transposed`, it is row `rows[j]`, column `columns[i]`.

    Attributes:
        tensor: Name in the checkpoint.
        shape: The tensor's.
        first_row: First row of the tensor, whose dimensions but the last one count as rows.
        rows: Rows of the slice.
        columns: Columns of the slice.
        transposed: Whether rows on disk are columns of the slice.
    """

    tensor: str
    shape: tuple[int, ...]
    first_row: int
    rows: range
    columns: range
    transposed: bool

    @property
    def num_rows(self) -> int:
        """Rows on disk."""
        return len(self.columns) if self.transposed else len(self.rows)


def disk_pieces(model: PreTrainedModel, target: MemorySlice) -> list[DiskPiece]:
    """The pieces of a slice in the checkpoint that `model.save_pretrained` would write.

    Args:
        model: The model; its parameters may be on the meta device.
        target: The slice.

    Returns:
        Pieces that cover the slice exactly once.

    Raises:
        ValueError: The family cuts its tensors in a way that is not whole rows or columns.
    """
    parameter = model.get_parameter(target.parameter)
    *lead, rows, columns = parameter.shape
    counted = torch.arange(parameter.numel() // columns, dtype=torch.int32).view(*lead, rows, 1)
    row_probe = _converted(model, target.parameter, counted.expand(*lead, rows, _NARROW))
    counted = torch.arange(columns, dtype=torch.int32)
    column_probe = _converted(model, target.parameter, counted.expand(*lead, _NARROW, columns))
    if row_probe.keys() != column_probe.keys():
        raise _not_understood(target.parameter)
    found = [_piece(name, row_probe[name], column_probe[name], target) for name in row_probe]
    pieces = [piece for piece in found if piece is not None]
    if sum(len(piece.rows) * len(piece.columns) for piece in pieces) != target.shape[0] * target.shape[1]:
        raise _not_understood(target.parameter)
    return pieces


def as_in_memory(model: nn.Module, target: MemorySlice) -> list[DiskPiece]:
    """The one piece of a slice in a checkpoint that was saved with the model's own names and shapes."""
    shape = tuple(model.get_parameter(target.parameter).shape)
    rows, columns = (range(size) for size in target.shape)
    return [DiskPiece(target.parameter, shape, target.first_row, rows, columns, transposed=False)]


def _converted(model: PreTrainedModel, name: str, probe: Tensor) -> Mapping[str, Tensor]:
    """What the checkpoint would hold if the parameter were the probe."""
    module_path, _, own_name = name.rpartition(".")
    module = model.get_submodule(module_path)
    parameter = module._parameters[own_name]
    # Some conversions compare a tensor's shape with the parameter's.
    module._parameters[own_name] = nn.Parameter(torch.empty(probe.shape, device="meta"), requires_grad=False)
    try:
        return cast(dict[str, Tensor], revert_weight_conversion(model, cast(Any, {name: probe.contiguous()})))
    except Exception as error:  # some conversions need further parameters
        raise _not_understood(name) from error
    finally:
        module._parameters[own_name] = parameter


def _piece(name: str, row_probe: Tensor, column_probe: Tensor, target: MemorySlice) -> DiskPiece | None:
    """The part of the slice in one tensor, from what the probes have become there; None if it holds none."""
    wanted = range(target.first_row, target.first_row + target.shape[0])
    inside = (row_probe >= wanted.start) & (row_probe < wanted.stop)
    if not inside.any():
        return None
    lead = tuple(row_probe.shape[:-2])
    index = 0
    if lead:  # a stack: the slice must be in one matrix of it
        stack = row_probe.flatten(0, -3)
        holds = inside.flatten(0, -3).flatten(1).any(dim=1).nonzero().flatten()
        if len(holds) > 1:
            raise _not_understood(target.parameter)
        index = int(holds)
        row_probe, column_probe = stack[index], column_probe.flatten(0, -3)[index]
    transposed = not _is_constant(row_probe, dim=1)
    if transposed:
        row_probe, column_probe = row_probe.T, column_probe.T
    if not (_is_constant(row_probe, dim=1) and _is_constant(column_probe, dim=0)):
        raise _not_understood(target.parameter)
    held = row_probe[:, 0]
    positions = ((held >= wanted.start) & (held < wanted.stop)).nonzero().flatten()
    rows = _as_range(held[positions] - wanted.start, target)
    columns = _as_range(column_probe[0], target)
    if len(_as_range(positions, target)) < len(held) and transposed:
        raise _not_understood(target.parameter)  # then the slice is part of every row on disk
    matrix = (len(columns), len(held)) if transposed else (len(held), len(columns))
    first_row = index * matrix[0] + (0 if transposed else int(positions[0]))
    return DiskPiece(name, (*lead, *matrix), first_row, rows, columns, transposed)


def _is_constant(matrix: Tensor, *, dim: int) -> bool:
    return bool((matrix == matrix.narrow(dim, 0, 1)).all())


def _as_range(values: Tensor, target: MemorySlice) -> range:
    """Evenly spaced, rising values as a range."""
    first, step = int(values[0]), int(values[1] - values[0]) if len(values) > 1 else 1
    spaced = range(first, first + step * len(values), step) if step > 0 else range(0)
    if list(spaced) != values.tolist():
        raise _not_understood(target.parameter)
    return spaced


def _not_understood(parameter: str) -> ValueError:
    return ValueError(
        f"the checkpoint of this model cuts {parameter} in a way that is not whole rows or columns; load the "
        "adapter onto the model and use merge_and_unload().save_pretrained(...)"
    )
