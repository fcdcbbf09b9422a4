"""Which parts of a model are in memory: a decoder layer at a time, the next one being read, and what is to stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.streaming.memory import GIB, available_memory
from uoe_peft.streaming.reader import PartReader

PartKey = int | str
"""A decoder layer by its index, another module by its path; all that is in no part by the empty path."""


@dataclass(frozen=True)
class _Slot:
    """Where a tensor of a part goes."""

    module: nn.Module
    own_name: str
    name: str
    absent: Tensor

    def put(self, value: Tensor) -> None:
        if self.own_name in self.module._buffers:
            self.module._buffers[self.own_name] = value
        else:
            self.module._parameters[self.own_name] = nn.Parameter(value, requires_grad=False)

    def clear(self) -> None:
        held = self.module._buffers if self.own_name in self.module._buffers else self.module._parameters
        held[self.own_name] = self.absent  # type: ignore[assignment]


class Residence:
    """Brings parts of a model into memory when they are entered, and drops the one that was there before.

    Args:
        model: With parameters on the meta device, wherever a part has not been entered.
        reader: Reads the parts.
        paths: Path in the model of each part; what is in none of them is a part, too, with the empty path.
        device: Where parts go.
    """

    def __init__(
        self, model: PreTrainedModel, reader: PartReader, paths: Mapping[PartKey, str], device: torch.device
    ) -> None:
        self.device = device
        self.ends_before: int | None = None
        self._reader = reader
        self._keys = {path: key for key, path in paths.items()}
        self._slots: dict[PartKey, list[_Slot]] = {key: [] for key in (*paths, "")}
        self._here: set[PartKey] = set()
        self._kept: set[PartKey] = set()
        self._holding = False
        # All reading is done by one thread: the reader is not shared, and what is read ahead comes first.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uoe-reader")
        self._ahead: tuple[PartKey, Future[dict[str, Tensor]]] | None = None
        self._left_out: set[str] = set()
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
            if tensor.is_meta:
                path, _, own_name = name.rpartition(".")
                module = model.get_submodule(path)
                # Some families send ids to where the embedding's weight is, and on the meta device they would be lost.
                absent = _weightless(tensor, device) if module is model.get_input_embeddings() else tensor
                slot = _Slot(module, own_name, self._held_as(model, name), absent)
                self._slots[self._part_of(name)].append(slot)
                slot.clear()

    def __contains__(self, key: PartKey) -> bool:
        return key in self._slots

    @property
    def parts(self) -> list[PartKey]:
        """All parts."""
        return list(self._slots)

    @property
    def here(self) -> frozenset[PartKey]:
        """Parts that are in memory."""
        return frozenset(self._here)

    def leave_out(self, names: set[str]) -> None:
        """Have parts come in without some parameters from now on: these are someone else's to read."""
        self._left_out |= names
        for slots in self._slots.values():
            slots[:] = [slot for slot in slots if slot.name not in names]

    def can_read_experts(self, name: str) -> bool:
        """Whether single experts of a stack can be read."""
        return self._reader.can_read_experts(name)

    def read_experts(self, names: Iterable[str], expert_indices: Sequence[int]) -> Future[dict[str, Tensor]]:
        """Some experts of stacks, as they are stored, once what is being read is there."""
        return self._thread.submit(self._reader.read_experts, list(names), expert_indices)

    def num_bytes(self, key: PartKey) -> int:
        """Memory that a part takes."""
        return sum(slot.absent.numel() * slot.absent.dtype.itemsize for slot in self._slots[key])

    def enter(self, key: PartKey) -> None:
        """Have a part in memory; others are dropped, but for those that are kept."""
        if key in self._here:
            return
        if not self._holding:
            self.drop_all()
        self._place(key, self._read(key))
        following = key + 1 if isinstance(key, int) else None
        if following in self._slots and following not in self._here and not self._holding and self._fits(following):
            self._ahead = (following, self._thread.submit(self._read_part, following))

    @property
    def least_bytes(self) -> int:
        """Memory that the largest part takes while it comes in, tensor by tensor, and nothing is read ahead."""
        return max(self.num_bytes(key) + self._read_bytes(key) // 3 for key in self._slots)

    def check_room(self, keys: Iterable[PartKey]) -> None:
        """Whether parts could be kept.

        Raises:
            ValueError: They need more memory than there is.
        """
        new = [key for key in keys if key not in self._here]
        needed, there = sum(map(self.num_bytes, new)), available_memory()
        if self.device.type == "cpu" and there is not None and needed > there:
            layers = sorted(key for key in new if isinstance(key, int))
            raise ValueError(
                f"the decoder layers {layers} are to stay in memory and take {needed / GIB:.1f} GiB, more than the "
                f"{there / GIB:.1f} GiB that are free; use forget_loss='rmu' with retain_loss='embed_diff' or "
                "'none', which need the edited layer alone, a higher layer, or a narrower dtype"
            )

    def keep(self, keys: Iterable[PartKey]) -> None:
        """Have parts in memory for good.

        Raises:
            ValueError: They need more memory than the machine has.
        """
        new = sorted(set(keys) - self._kept, key=str)
        self.check_room(new)
        for key in new:
            if key not in self._here:
                self._place(key, self._read(key))
            self._kept.add(key)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Inside the context nothing is dropped, and nothing is read ahead."""
        self._holding, before = True, self._holding
        try:
            yield
        finally:
            self._holding = before

    @contextmanager
    def ending_before(self, layer_idx: int) -> Iterator[None]:
        """Inside the context a pass that would call this layer is ended, see `Stop` of `loading`."""
        self.ends_before = layer_idx
        try:
            yield
        finally:
            self.ends_before = None

    def drop_all(self) -> None:
        """Drop every part that is not kept."""
        for key in self._here - self._kept:
            for slot in self._slots[key]:
                slot.clear()
        self._here &= self._kept

    def _read(self, key: PartKey) -> dict[str, Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == key:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].cancel()
        return self._thread.submit(self._read_part, key).result()

    def _fits(self, key: PartKey) -> bool:
        """Whether there is memory to read a part."""
        there = available_memory()
        return there is None or self._reader.peak_bytes({slot.name for slot in self._slots[key]}) <= there

    def _read_bytes(self, key: PartKey) -> int:
        return self._reader.num_bytes({slot.name for slot in self._slots[key]})

    def _read_part(self, key: PartKey) -> dict[str, Tensor]:
        names = {slot.name for slot in self._slots[key]}
        return self._reader.read(
            lambda name: name in names or (name not in self._left_out and self._part_of(name) == key)
        )

    def _part_of(self, name: str) -> PartKey:
        """The part that a parameter is in: the innermost one."""
        parts = name.split(".")
        paths = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        return next((self._keys[path] for path in paths if path in self._keys), "")

    def _held_as(self, model: PreTrainedModel, name: str) -> str:
        """A parameter's name, or that of one that it is tied to where only that is in the checkpoint."""
        tied = cast(dict[str, str], getattr(model, "all_tied_weights_keys", None) or {})
        both = (name, *(source for target, source in tied.items() if target == name))
        others = tuple(target for target, source in tied.items() if source in both)
        return next((held for held in (*both, *others) if self._reader.holds(held)), name)

    def _place(self, key: PartKey, read: dict[str, Tensor]) -> None:
        uses = {slot.name: 0 for slot in self._slots[key]}
        for slot in self._slots[key]:
            uses[slot.name] += 1
        absent = sorted(uses.keys() - read.keys())
        if absent:
            raise ValueError(f"the checkpoint has no {absent[0]} ({len(absent)} tensors of {key!r} are missing)")
        try:
            # Whoever brings a layer in may be in inference mode; the next one to use it may be training.
            with torch.inference_mode(False):
                for slot in self._slots[key]:
                    uses[slot.name] -= 1
                    # Let go at once of what is not needed again: a layer's narrow and wide copies are never both whole.
                    value = read[slot.name] if uses[slot.name] else read.pop(slot.name)
                    slot.put(value.to(self.device, slot.absent.dtype))
        except BaseException:  # no memory, or Ctrl-C: half a layer is none
            for slot in self._slots[key]:
                slot.clear()
            raise
        self._here.add(key)


def _weightless(tensor: Tensor, device: torch.device) -> nn.Parameter:
    """A parameter of a tensor's shape and dtype on a device, where it takes the memory of one number."""
    one = torch.zeros((), dtype=tensor.dtype, device=device)
    return nn.Parameter(one.expand(tensor.shape), requires_grad=False)
