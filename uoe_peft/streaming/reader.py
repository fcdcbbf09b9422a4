"""Parts of a checkpoint as a model's modules want them, through transformers' own weight conversion.

A checkpoint names and cuts tensors in its own way: experts one by one on disk are stacks in memory, in each family
differently. The conversion that `from_pretrained` uses for a whole model is run here on those tensors alone that a part
of it is made of, with a second model, on the meta device, to put them into. Stacks of experts, nearly all of a layer,
are read to where that conversion would have copied them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from uoe_peft.streaming.checkpoint import Checkpoint
from uoe_peft.streaming.stacks import ExpertSources, SomeExperts, Stack, find_expert_sources, find_stack

# Groups that are larger are converted one after the other, so that not all tensors of a layer are there twice.
_LARGE = 64 * 2**20

_bars = threading.Lock()


class PartReader:
    """Reads parts of a checkpoint, each a set of the model's parameters and saved buffers.

    Args:
        skeleton: A model whose parameters are on the meta device; its own from now on.
        checkpoint: What to read.
        dtypes: What each parameter is to be computed in, by name.
        quantizer: Makes the tensors of a quantised checkpoint plain.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        checkpoint: Checkpoint,
        dtypes: dict[str, torch.dtype],
        quantizer: HfQuantizer | None = None,
    ) -> None:
        self._model, self._checkpoint, self._quantizer = skeleton, checkpoint, quantizer
        self._names = set(skeleton.state_dict())
        self._sources: dict[str, list[str]] = {}
        self._stacks: dict[str, Stack] = {}
        self._of_experts: dict[str, ExpertSources] = {}
        converters = [entry for entry in self._mapping() if isinstance(entry, WeightConverter)]
        by_patterns = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        for name, by_pattern in self._grouped(checkpoint.tensors).items():
            self._sources[name] = sources = [source for found in by_pattern.values() for source in found]
            self._narrow(name, {checkpoint.tensors[source].dtype for source in sources}, dtypes)
            self._find_stack(name, by_patterns.get(next(iter(by_pattern))), by_pattern)

    def read(self, belongs: Callable[[str], bool]) -> dict[str, Tensor]:
        """The parameters and saved buffers whose names belong to a part.

        They are as narrow as they are stored, where they are computed in something wider: widening a number changes no
        bit of it, now or later.

        Args:
            belongs: Whether a name of the model belongs to the part.

        Raises:
            ValueError: A shard was cut off since it was opened, or cannot be converted.
        """
        groups = {name: sources for name, sources in self._sources.items() if belongs(name)}
        read: dict[str, Tensor] = {}
        converted = [sources for name, sources in groups.items() if name not in self._stacks]
        # The largest first: while it is put together there is nothing else yet.
        for pack in self._packs(sorted(converted, key=self._num_stored_bytes, reverse=True)):
            with self._checkpoint.slices(pack) as slices:
                read |= self._converted(slices)
        for name in groups.keys() & self._stacks.keys():
            with self._checkpoint.slices(groups[name]) as slices:
                read[name] = self._stacks[name].read(slices)
        return read

    def can_read_experts(self, name: str) -> bool:
        """Whether it is known what on disk single experts of a stack are made of."""
        return name in self._of_experts

    def read_experts(self, names: Sequence[str], expert_indices: Sequence[int]) -> dict[str, Tensor]:
        """Some experts of stacks, as :meth:`read` would read them.

        Args:
            names: Parameters of which single experts can be read.
            expert_indices: Which, rising.

        Returns:
            By name. Shape `(number of experts, ...)` each.

        Raises:
            ValueError: A shard was cut off since it was opened, or cannot be converted.
        """
        read: dict[str, Tensor] = {}
        for name in names:
            sources = self._of_experts[name]
            each = [source for expert_idx in expert_indices for source in sources.of_each[expert_idx]]
            with self._checkpoint.slices([*each, *sources.of_all]) as slices:
                if name in self._stacks:
                    read[name] = self._stacks[name].of(expert_indices).read(slices)
                    continue
                some = {source: SomeExperts(slices[source], expert_indices) for source in sources.of_all}
                with self._of_size(name, len(expert_indices)):
                    read |= self._converted({**slices, **some})
        return read

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has a parameter under this name."""
        return name in self._sources

    def num_bytes(self, names: Container[str]) -> int:
        """Memory that parameters and buffers of these names take as they are read."""
        return sum(
            value.numel() * value.dtype.itemsize for name, value in self._model.state_dict().items() if name in names
        )

    def peak_bytes(self, names: Container[str]) -> int:
        """Memory that reading them takes: parts of what is converted are there twice for a while."""
        converted = {name for name in self._names if name in names and name not in self._stacks}
        return self.num_bytes(names) + self.num_bytes(converted) // 3

    def _mapping(self) -> list[Any]:
        # Made anew for each use: conversions remember what they have seen.
        return get_model_conversion_mapping(self._model, hf_quantizer=self._quantizer)

    def _grouped(self, tensors: Iterable[str]) -> dict[str, dict[str, list[str]]]:
        """Names on disk by the first of the parameters that they become, and by the pattern that they match."""
        mapping, known = self._mapping(), self._model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix
        groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for source in tensors:
            name, pattern = rename_source_key(source, renamings, converters, prefix, known)
            if name not in known and source in known:
                name, pattern = rename_source_key(source, [], [], prefix, known)
            if name in known:  # some checkpoints hold more layers than the model has, to predict further tokens with
                groups[name][pattern or ""].append(source)
        return groups

    def _find_stack(
        self, name: str, converter: WeightConverter | None, by_pattern: Mapping[str, Sequence[str]]
    ) -> None:
        """Have a parameter put together here, if it is a plain stack of what is on disk; note what experts are of."""
        tensors, parameter = self._checkpoint.tensors, self._model.state_dict()[name]
        if parameter.dim() != 3:
            return
        if converter is not None:
            stack = find_stack(converter, by_pattern, tensors, parameter)
            if stack is not None:
                self._stacks[name] = stack
        operations = [] if converter is None else converter.operations
        sources = find_expert_sources(operations, by_pattern, tensors, len(parameter))
        if sources is not None:
            self._of_experts[name] = sources

    def _narrow(self, name: str, stored: set[torch.dtype], dtypes: dict[str, torch.dtype]) -> None:
        """Have a parameter read in the type that it is stored in, if that is narrower; conversions cast to its own."""
        path, _, own_name = name.rpartition(".")
        module = self._model.get_submodule(path) if name in self._names else None
        if module is None or own_name not in module._parameters:
            return
        # Numbers of four bits with a power of two for each block are exact in bfloat16.
        (first, *others), wanted = ({torch.bfloat16} if stored == {torch.uint8} else stored), dtypes[name]
        is_narrower = first.is_floating_point and first.itemsize < wanted.itemsize
        parameter = torch.empty(
            module.get_parameter(own_name).shape,
            dtype=first if is_narrower and not others else wanted,
            device="meta",
        )
        module._parameters[own_name] = nn.Parameter(parameter, requires_grad=False)

    def _packs(self, groups: Iterable[Sequence[str]]) -> Iterator[list[str]]:
        """Groups, large ones alone and the small ones together."""
        small: list[str] = []
        for sources in groups:
            if self._num_stored_bytes(sources) > _LARGE:
                yield list(sources)
            else:
                small += sources
        if small:
            yield small

    def _num_stored_bytes(self, sources: Iterable[str]) -> int:
        return sum(self._checkpoint.tensors[source].num_bytes for source in sources)

    @contextmanager
    def _of_size(self, name: str, num_experts: int) -> Iterator[None]:
        """Inside the context the model's stack has so many experts."""
        path, _, own_name = name.rpartition(".")
        held = self._model.get_submodule(path)._parameters
        whole = held[own_name]
        assert whole is not None
        held[own_name] = nn.Parameter(whole.new_empty(num_experts, *whole.shape[1:]), requires_grad=False)
        try:
            yield
        finally:
            held[own_name] = whole

    def _converted(self, slices: Mapping[str, Any]) -> dict[str, Tensor]:
        loading = LoadStateDictConfig(
            device_map={"": "cpu"}, weight_mapping=self._mapping(), hf_quantizer=self._quantizer
        )
        with no_loading_bar():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(slices), loading)
        if info.conversion_errors or info.mismatched_keys:
            problem = next(iter(info.conversion_errors.values()), None) or sorted(info.mismatched_keys)[0]
            raise ValueError(f"tensors of {self._checkpoint.name} cannot be made those of the model: {problem}")
        return {name: self._taken(name) for name in self._names - info.missing_keys}

    def _taken(self, name: str) -> Tensor:
        """A tensor that was loaded; the meta tensor is put back in its place."""
        path, _, own_name = name.rpartition(".")
        module = self._model.get_submodule(path)
        if own_name in module._buffers:
            value = module._buffers[own_name]
            assert value is not None
            return value
        value = module.get_parameter(own_name).detach()
        meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
        module._parameters[own_name] = nn.Parameter(meta, requires_grad=False)
        return value


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Inside the context transformers shows no bar for each part that is loaded."""
    with _bars:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
