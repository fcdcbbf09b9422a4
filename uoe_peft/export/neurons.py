"""What an adapter of groups of neurons changes in the dense checkpoint: rows and columns that lie apart.

Letters: H hidden size, I neurons of a layer, i of them in a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.checkpoints import as_bytes
from uoe_peft.dense.block import GroupedMLP
from uoe_peft.export.checkpoint import Checkpoint
from uoe_peft.export.edits import SliceEdit, TensorEdit
from uoe_peft.export.rewriting import Patch
from uoe_peft.moe import find_moe_blocks


@dataclass(frozen=True)
class NeuronEdit:
    """The part of a slice's delta that belongs to one matrix of the dense model.

    Attributes:
        edit: The slice's delta.
        rows: Rows of the slice.
        columns: Columns of the slice.
        neurons: The group's neurons. Shape `(i,)`.
        num_neurons: I.
        dim: Dimension of the dense matrix along which neurons lie: 0 of `gate_proj` and `up_proj`, 1 of `down_proj`.
    """

    edit: SliceEdit
    rows: range
    columns: range
    neurons: Tensor
    num_neurons: int
    dim: int

    def apply(self, weight: Tensor) -> None:
        """Add the delta to the neurons of a dense matrix, in place; the others are not touched."""
        own = weight.index_select(self.dim, self.neurons).T  # the groups are stored transposed
        weight.index_copy_(self.dim, self.neurons, self.edit.apply(own, self.rows, self.columns).T.contiguous())


def in_groups(model: nn.Module) -> bool:
    """Whether the experts of a model are groups of a dense model's neurons."""
    return any(isinstance(module, GroupedMLP) for module in model.modules())


def neuron_edits(edits: Sequence[SliceEdit], model: nn.Module) -> Mapping[str, list[NeuronEdit]]:
    """What changes in each matrix of the dense model, by the matrix' name.

    Args:
        edits: Of slices of the factorized model.
        model: The factorized model, with weights or without.
    """
    paths = {block.layer_idx: block.experts_name.removesuffix(".experts") for block in find_moe_blocks(model)}
    by_matrix: dict[str, list[NeuronEdit]] = defaultdict(list)
    for edit in edits:
        path = paths[edit.layer_idx]
        block = model.get_submodule(path)
        assert isinstance(block, GroupedMLP) and edit.expert_idx is not None
        own, num_neurons = block.neurons[edit.expert_idx], block.neurons.numel()
        rows, columns = (range(size) for size in edit.target.shape)
        if edit.projection == "down_proj":  # (i, H)
            by_matrix[f"{path}.down_proj.weight"].append(NeuronEdit(edit, rows, columns, own, num_neurons, 1))
            continue
        half = len(columns) // 2  # (H, 2i): gate, then up
        for name, part in (("gate_proj", columns[:half]), ("up_proj", columns[half:])):
            by_matrix[f"{path}.{name}.weight"].append(NeuronEdit(edit, rows, part, own, num_neurons, 0))
    return by_matrix


def plan_neurons(
    edits: Sequence[SliceEdit], checkpoint: Checkpoint, model: PreTrainedModel
) -> tuple[list[TensorEdit], dict[str, list[Patch]]]:
    """What to write where; a matrix of which neurons change is written as a whole.

    Args:
        edits: Of slices of the factorized model.
        checkpoint: The dense model's.
        model: The factorized model, without weights.

    Returns:
        A line for each tensor that changes, and the patches of each shard.

    Raises:
        ValueError: The checkpoint lacks a tensor, or has it in another shape or in numbers that cannot be added to.
    """
    tensors, patches = [], defaultdict(list)
    for name, own in neuron_edits(edits, model).items():
        change, patch = _change(name, own, checkpoint)
        tensors.append(change)
        patches[change.shard].append(patch)
    return tensors, dict(patches)


def _change(name: str, edits: Sequence[NeuronEdit], checkpoint: Checkpoint) -> tuple[TensorEdit, Patch]:
    if name not in checkpoint.weight_map:
        raise ValueError(
            f"{checkpoint.name} has no tensor {name}; expected the names that save_pretrained of the dense model "
            "gives: load the model and save it, then merge into that"
        )
    stored, shard = checkpoint.tensor(name), checkpoint.weight_map[name]
    first = edits[0]
    shape = (first.num_neurons, len(first.rows)) if first.dim == 0 else (len(first.columns), first.num_neurons)
    if stored.shape != shape or not stored.is_precise:
        raise ValueError(
            f"{name} of {checkpoint.name} is stored as {stored.dtype} of shape {stored.shape}; expected floats of at "
            f"least 16 bits and shape {shape}. Quantised weights cannot be edited: merge into the checkpoint that they "
            "were made from"
        )
    file, size = checkpoint.shard(shard), stored.stop - stored.start

    def blocks() -> Iterator[memoryview]:
        weight = file.read_rows(name)
        for edit in edits:
            edit.apply(weight)
        yield as_bytes(weight)

    return TensorEdit(name, shard, size, stored.start), Patch(stored.start, size, blocks)
