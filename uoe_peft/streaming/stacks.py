"""Single experts' matrices, read straight into the stack that a model holds of them.

What transformers' conversion does of a stack's parts, it does after all of them were read: it copies them into a stack
for each projection, and those into one. Here each matrix is copied once, to its place, and is gone before the next.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

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

# As many files as transformers reads at a time.
_READERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Stack:
    """Where matrices go in a stack of all experts.

    Attributes:
        shape: `(E, rows, columns)`.
        dtype: Of the matrices and of the stack.
        places: For each matrix, by its name on disk, the expert and the first of the rows that it fills.
    """

    shape: torch.Size
    dtype: torch.dtype
    places: dict[str, tuple[int, int]]

    def of(self, expert_indices: Sequence[int]) -> Stack:
        """The stack of some of the experts, in this order."""
        new = {expert_idx: place for place, expert_idx in enumerate(expert_indices)}
        places = {name: (new[expert_idx], row) for name, (expert_idx, row) in self.places.items() if expert_idx in new}
        return Stack(torch.Size((len(new), *self.shape[1:])), self.dtype, places)

    def read(self, slices: Mapping[str, Any]) -> Tensor:
        """The stack.

        Args:
            slices: Matrices that are read when `[...]` is asked of them, by name on disk.
        """
        stack = torch.empty(self.shape, dtype=self.dtype)

        def put(name: str) -> None:
            (expert_idx, row), matrix = self.places[name], slices[name][...]
            stack[expert_idx, row : row + len(matrix)] = matrix

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
    match converter.operations:
        case [MergeModulelist(dim=0)] if len(converter.source_patterns) == 1:
            pass
        case [MergeModulelist(dim=0), Concatenate(dim=1)] if len(converter.source_patterns) > 1:
            pass
        case _:
            return None
    places: dict[str, tuple[int, int]] = {}
    first_row = 0
    for pattern in converter.source_patterns:
        names = sorted(sources.get(pattern, ()), key=dot_natural_key)
        found = {(tensors[name].dtype, tensors[name].shape) for name in names}
        num_rows = next((shape[0] for _, shape in found if len(shape) == 2), 0)
        wanted = {(parameter.dtype, (num_rows, parameter.shape[-1]))}
        if parameter.dim() != 3 or len(names) != len(parameter) or found != wanted:
            return None
        places |= {name: (expert_idx, first_row) for expert_idx, name in enumerate(names)}
        first_row += num_rows
    return Stack(parameter.shape, parameter.dtype, places) if first_row == parameter.shape[1] else None


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
