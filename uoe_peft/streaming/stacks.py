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
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, dot_natural_key

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
