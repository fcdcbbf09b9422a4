"""Single experts' matrices, read straight into the stack that a model holds of them.

What transformers' conversion does of a stack's parts, it does after all of them were read: it copies them into a stack
for each projection, and those into one. Here each matrix is copied once, to its place, and is gone before the next.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from uoe_peft.streaming.checkpoint import StoredTensor
from uoe_peft.streaming.quantisation import put_plain

# As many files as transformers reads at a time.
_READERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Stack:
    """Where matrices go in a stack of all experts.

    Attributes:
        shape: `(E, rows, columns)`.
        dtype: Of the stack, and of matrices without scales.
        places: For each matrix, by its name on disk, the expert and the first of the rows that it fills.
        scales: Names of the scales of matrices in eight bits.
    """

    shape: torch.Size
    dtype: torch.dtype
    places: dict[str, tuple[int, int]]
    scales: dict[str, str]

    def of(self, expert_indices: Sequence[int]) -> Stack:
        """The stack of some of the experts, in this order."""
        new = {expert_idx: place for place, expert_idx in enumerate(expert_indices)}
        places = {name: (new[expert_idx], row) for name, (expert_idx, row) in self.places.items() if expert_idx in new}
        scales = {name: scale for name, scale in self.scales.items() if name in places}
        return Stack(torch.Size((len(new), *self.shape[1:])), self.dtype, places, scales)

    def read(self, slices: Mapping[str, Any]) -> Tensor:
        """The stack.

        Args:
            slices: Matrices that are read when `[...]` is asked of them, by name on disk.
        """
        stack = torch.empty(self.shape, dtype=self.dtype)

        def put(name: str) -> None:
            (expert_idx, row), matrix = self.places[name], slices[name][...]
            rows = stack[expert_idx, row : row + len(matrix)]
            if name in self.scales:
                put_plain(matrix, slices[self.scales[name]][...], rows)
            else:
                rows.copy_(matrix)

        with ThreadPoolExecutor(_READERS) as readers:
            list(readers.map(put, self.places))
        return stack


def find_stack(
    converter: WeightConverter,
    sources: Mapping[str, Sequence[str]],
    tensors: Mapping[str, StoredTensor],
    parameter: Tensor,
) -> Stack | None:
    """The stack that a conversion makes of matrices; None where it does anything else.

    Args:
        converter: Of transformers.
        sources: Names on disk by the converter's patterns that they match.
        tensors: What is known of them.
        parameter: What they become, on the meta device, in the dtype that it is to be read in.
    """
    dequantizer = next((op for op in converter.operations[:1] if isinstance(op, Fp8Dequantize)), None)
    stacking = converter.operations[dequantizer is not None :]
    patterns = [pattern for pattern in converter.source_patterns if dequantizer is None or not _is_of_scales(pattern)]
    if parameter.dim() != 3 or not _stack(stacking, len(patterns)):
        return None
    num_experts, _, num_columns = parameter.shape
    places: dict[str, tuple[int, int]] = {}
    scales: dict[str, str] = {}
    first_row = 0
    for pattern in patterns:
        names = sorted(sources.get(pattern, ()), key=dot_natural_key)
        dtype = parameter.dtype if dequantizer is None else torch.float8_e4m3fn
        num_rows = _num_rows([tensors[name] for name in names], dtype, num_columns)
        if len(names) != num_experts or num_rows is None:
            return None
        places |= {name: (expert_idx, first_row) for expert_idx, name in enumerate(names)}
        if dequantizer is not None:
            own = sorted(sources.get(f"{pattern}_scale_inv", ()), key=dot_natural_key)
            block = cast(Any, dequantizer).hf_quantizer.quantization_config.weight_block_size
            shape = (num_rows, num_columns)
            if len(own) != num_experts or not all(_are_of_blocks(tensors[name], shape, block) for name in own):
                return None
            scales |= dict(zip(names, own, strict=True))
        first_row += num_rows
    if first_row != parameter.shape[1] or len(places) + len(scales) != sum(map(len, sources.values())):
        return None
    return Stack(parameter.shape, parameter.dtype, places, scales)


def _stack(operations: Sequence[ConversionOps], num_patterns: int) -> bool:
    """Whether operations make a stack of all experts, their projections one below the other, and nothing else."""
    match operations:
        case [MergeModulelist(dim=0)]:
            return num_patterns == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return num_patterns > 1
        case _:
            return False


def _num_rows(matrices: Sequence[StoredTensor], dtype: torch.dtype, num_columns: int) -> int | None:
    """Rows that all of these matrices have; None where they differ, or are not of this dtype and so many columns."""
    found = {(matrix.dtype, matrix.shape[1:], matrix.shape[:1]) for matrix in matrices}
    if len(found) != 1:
        return None
    ((own, columns, rows),) = found
    return rows[0] if own == dtype and columns == (num_columns,) else None


def _is_of_scales(pattern: str) -> bool:
    return pattern.endswith(("_scale_inv", "activation_scale"))


def _are_of_blocks(scales: StoredTensor, shape: tuple[int, int], block: Sequence[int] | None) -> bool:
    """Whether these are scales of a matrix' blocks, none of them cut, and its numbers can be taken in pairs."""
    if block is None or scales.dtype not in (torch.float32, torch.bfloat16) or shape[1] % 2:
        return False
    return len(scales.shape) == 2 and all(map(operator.eq, shape, map(operator.mul, scales.shape, block)))


@dataclass(frozen=True)
class ExpertSources:
    """What is to be read of a stack for some of its experts.

    Attributes:
        of_each: Names on disk of the tensors of each expert.
        of_all: Names of tensors that have the experts along their first dimension.
    """

    of_each: tuple[tuple[str, ...], ...]
    of_all: tuple[str, ...]


class SomeExperts:
    """A tensor on disk as if it had some of its experts alone."""

    def __init__(self, whole: Any, expert_indices: Sequence[int]) -> None:
        self._whole, self._expert_indices = whole, expert_indices

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def __getitem__(self, index: Any) -> Tensor:
        return torch.cat([self._whole[expert_idx : expert_idx + 1] for expert_idx in self._expert_indices])[index]


def find_expert_sources(
    operations: Sequence[ConversionOps],
    sources: Mapping[str, Sequence[str]],
    tensors: Mapping[str, StoredTensor],
    num_experts: int,
) -> ExpertSources | None:
    """What each expert of a stack is made of; None where that cannot be told.

    Args:
        operations: That make the stack.
        sources: Names on disk by the converter's patterns that they match.
        tensors: What is known of them.
        num_experts: Of the stack.
    """
    if not all(map(_is_done_to_each, operations)):
        return None
    of_each: list[tuple[str, ...]] = [()] * num_experts
    of_all: list[str] = []
    for names in sources.values():
        if len(names) == 1 and tensors[names[0]].shape[:1] == (num_experts,):
            of_all += names
        elif len(names) == num_experts:
            by_number = sorted(names, key=dot_natural_key)
            of_each = [(*before, name) for before, name in zip(of_each, by_number, strict=True)]
        else:
            return None
    return ExpertSources(tuple(of_each), tuple(of_all))


def _is_done_to_each(operation: ConversionOps) -> bool:
    """Whether an operation does the same to each expert of a stack, whichever others are there."""
    match operation:
        case MergeModulelist(dim=0) | Fp8Dequantize() | Mxfp4Dequantize():
            return True
        case Concatenate(dim=dim):
            return dim != 0
        case Transpose(dim0=first, dim1=second):
            return 0 not in (first, second)
        case _:
            return False
