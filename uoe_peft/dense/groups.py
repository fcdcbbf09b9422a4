"""Which group each neuron of a dense model's feed-forward layers belongs to.

Letters: E groups, I neurons of a layer (its intermediate size).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from uoe_peft.checkpoints import read_record

_FORMAT = "uoe_peft.neuron_groups/1"
_PREFIX = "layers."


@dataclass(frozen=True, eq=False)
class NeuronGroups:
    """A partition of the neurons of each layer into groups of equal size.

    Attributes:
        by_layer: The group of each neuron, 0 to E - 1, by decoder layer. Shape `(I,)` each, int64.
        num_groups: E, the same in every layer.

    Raises:
        ValueError: There are no layers or fewer than two groups, a layer's tensor is of another form, or its groups
            differ in size.
    """

    by_layer: Mapping[int, Tensor]
    num_groups: int

    def __post_init__(self) -> None:
        check_num_groups(self.num_groups)
        if not self.by_layer:
            raise ValueError("the groups name no layer; expected the group of each neuron of at least one layer")
        for layer_idx, groups in self.by_layer.items():
            if groups.dim() != 1 or groups.is_floating_point() or groups.dtype == torch.bool or not len(groups):
                raise ValueError(
                    f"the groups of layer {layer_idx} have shape {tuple(groups.shape)} and dtype {groups.dtype}; "
                    "expected one integer for each neuron"
                )
            numbers, sizes = groups.unique(return_counts=True)
            if numbers.tolist() != list(range(self.num_groups)) or len(sizes.unique()) > 1:
                held = dict(zip(numbers.tolist()[:9], sizes.tolist(), strict=False))
                raise ValueError(
                    f"the {len(groups)} neurons of layer {layer_idx} are in groups of the sizes {held}; expected "
                    f"{self.num_groups} groups of equal size, numbered from 0"
                )

    @classmethod
    def random(cls, num_neurons: Mapping[int, int], num_groups: int, *, seed: int = 0) -> NeuronGroups:
        """Groups that know nothing of what neurons do: the control of any clustering.

        Args:
            num_neurons: I of each decoder layer.
            num_groups: E.
            seed: Of the draw.

        Raises:
            ValueError: A layer's neurons cannot be divided into so many groups.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for layer_idx, size in num_neurons.items():
            check_divides(num_groups, size, layer_idx=layer_idx)
            drawn[layer_idx] = torch.randperm(size, generator=generator) % num_groups
        return cls(drawn, num_groups)

    def order(self, layer_idx: int) -> Tensor:
        """The neurons of each group, ascending. Shape `(E, I / E)`, int64."""
        return self.by_layer[layer_idx].argsort(stable=True).view(self.num_groups, -1)

    def fingerprint(self, layer_idx: int) -> str:
        """Hash of a layer's groups, 16 hexadecimal digits: an adapter of one partition means nothing to another."""
        numbers = self.by_layer[layer_idx].to("cpu", torch.int64).contiguous()
        return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the groups to a safetensors file of 4 bytes a neuron."""
        tensors = {f"{_PREFIX}{i}": groups.to("cpu", torch.int32).contiguous() for i, groups in self.by_layer.items()}
        save_file(tensors, str(path), metadata={"format": _FORMAT, "num_groups": str(self.num_groups)})

    @classmethod
    def load(cls, path: str | Path) -> NeuronGroups:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no such file, is truncated, or holds no partition into equal groups.
        """
        metadata, tensors = read_record(path, kind=_FORMAT, writer="NeuronGroups.save")
        layers = {name: name.removeprefix(_PREFIX) for name in tensors}
        foreign = sorted(name for name, number in layers.items() if not number.isdigit() or number == name)
        count = metadata.get("num_groups", "")
        if foreign or not count.isdigit():
            raise ValueError(f"{path} holds {foreign[:3] or 'no number of groups'}; expected layers.0 and so on")
        by_layer = {int(layers[name]): tensors[name].long() for name in sorted(tensors, key=lambda n: int(layers[n]))}
        try:
            return cls(by_layer, int(count))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def check_num_groups(num_groups: int) -> None:
    """Raise ValueError for fewer than two groups."""
    if num_groups < 2:
        raise ValueError(f"num_groups must be at least 2, got {num_groups}")


def check_divides(num_groups: int, num_neurons: int, *, layer_idx: int) -> None:
    """Raise ValueError where neurons cannot be divided into groups of equal size."""
    check_num_groups(num_groups)
    if num_neurons % num_groups:
        near = [n for n in range(2, 65) if num_neurons % n == 0]
        raise ValueError(
            f"the {num_neurons} neurons of layer {layer_idx} cannot be divided into {num_groups} groups of equal size; "
            f"use one of {near}"
        )
