"""Experts that stay on disk where a decoder layer does not fit into memory with them: read in blocks, used, dropped.

A layer then comes in without the stacks of its routed experts. Where its experts are called, those that got tokens are
read a few at a time, the next ones while these compute. So that many passes read each expert once, a pass can be ended
where the experts are called, and go on from there when what they put out is known.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import MoEBlock, find_moe_blocks
from uoe_peft.moe.experts import unwrap
from uoe_peft.moe.segments import detached, find_layers
from uoe_peft.moe.storage import shallow_copy
from uoe_peft.streaming.blocks import ExpertsCall, Order, add_up, addition_order, experts_with_tokens, run_block
from uoe_peft.streaming.loading import Stop
from uoe_peft.streaming.memory import BLOCK_BYTES, BLOCKS
from uoe_peft.streaming.residence import Residence

# Single experts that are remembered: those that adapters edit.
_REMEMBERED = 16


class StackOnDisk(nn.Parameter):
    """The matrices of all experts, none of which is in memory: `stack[expert_idx]` is a copy of one."""

    held_by: ExpertsOnDisk
    own_name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.held_by.one_expert(int(index))[self.own_name]


@dataclass
class Interrupted:
    """A pass that was ended where its experts were called.

    Attributes:
        call: What they were called with; None where the pass did not come so far.
        outputs: What they put out, once it is known. Shape `(T, K, H)`.
        done: What other large parts of the layer had returned by then.
    """

    call: ExpertsCall | None = None
    outputs: Tensor | None = None
    done: dict[nn.Module, list[Any]] = field(default_factory=dict)


class ExpertsOnDisk:
    """The routed experts of a layer, whose stacks are not in memory from now on.

    Args:
        model: Streamed.
        block: Its experts are of the contract of transformers' `use_experts_implementation`.
        residence: Reads for all.
        block_bytes: Memory that experts of a block may take as they are computed with; one is always there.
    """

    def __init__(self, model: nn.Module, block: MoEBlock, residence: Residence, *, block_bytes: int) -> None:
        self._module, self._residence = block.storage.module, residence
        self._layer = find_layers(model).get_submodule(str(block.layer_idx))
        self._num_experts = block.num_experts
        # Whoever records routing looks into the router while it runs, so that it must run with the rest of a pass.
        self._beside = {self._module, unwrap(block.router)}
        self._names = stack_names(block)
        self._known: Interrupted | None = None
        self._is_interrupting = False
        self._remembered: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._expert_bytes = expert_bytes(block)
        self._per_block = min(block.num_experts, max(1, block_bytes // self._expert_bytes))
        for own_name in self._names:
            stack = StackOnDisk(self._module.get_parameter(own_name).detach(), requires_grad=False)
            stack.held_by, stack.own_name = self, own_name
            self._module._parameters[own_name] = stack
        self._module.forward = self._forward

    @property
    def num_bytes(self) -> int:
        """Memory that all of the experts would take."""
        return self._num_experts * self._expert_bytes

    @property
    def num_block_bytes(self) -> int:
        """Memory that reading them in blocks takes."""
        return BLOCKS * self._per_block * self._expert_bytes

    @property
    def order(self) -> Order:
        """In which the module adds up what experts put out.

        Raises:
            UnsupportedModelError: It runs them in a way of which that is not known.
        """
        implementation = cast(Any, self._module).config._experts_implementation
        order = addition_order(implementation)
        if order is None:
            raise UnsupportedModelError(
                f"experts that are read in blocks cannot be run by {implementation!r}; call "
                "model.set_experts_implementation('grouped_mm'), or give a layer enough memory"
            )
        return order

    def one_expert(self, expert_idx: int) -> dict[str, Tensor]:
        """The matrices of an expert, by the names of their stacks. Shape `(out, in)` each, or as the stack has it.

        Raises:
            IndexError: There is no such expert.
        """
        if not -self._num_experts <= expert_idx < self._num_experts:
            raise IndexError(f"expert {expert_idx} of {self._num_experts}")
        expert_idx %= self._num_experts
        found = self._remembered.get(expert_idx)
        if found is None or next(iter(found.values())).device != self._residence.device:
            read = self._residence.read_experts(self._names.values(), [expert_idx]).result()
            found = {name: value[0] for name, value in self._placed(read).items()}
        self._remembered[expert_idx] = found
        self._remembered.move_to_end(expert_idx)
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def compute(self, passes: Sequence[Interrupted]) -> None:
        """Have the experts put out what they do, for passes that were interrupted; each expert is read once."""
        calls = [(own.call, own) for own in passes if own.call is not None]
        for call, own in calls:
            own.outputs = call.no_outputs()
        for expert_indices, experts in self._blocks(experts_with_tokens([c for c, _ in calls], self._num_experts)):
            for call, own in calls:
                run_block(experts, call, expert_indices, cast(Tensor, own.outputs), order=self.order)
            del experts  # before the next ones are there

    @contextmanager
    def interrupting(self) -> Iterator[Interrupted]:
        """Inside the context a pass is ended where the experts are called; what it did by then is noted."""
        noted = Interrupted()

        def keep(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            noted.done.setdefault(part, []).append(detached(output))

        handles = [part.register_forward_hook(keep) for part in _large_parts(self._layer, beside=self._beside)]
        self._known, self._is_interrupting = noted, True
        try:
            yield noted
        finally:
            self._known, self._is_interrupting = None, False
            for handle in handles:
                handle.remove()

    @contextmanager
    def going_on(self, noted: Interrupted) -> Iterator[None]:
        """Inside the context the same pass does nothing again that it had done, and its experts say what is known."""
        self._known = noted
        before = {part: vars(part).get("forward") for part in noted.done}
        for part, outputs in noted.done.items():
            if len(outputs) == 1:
                part.forward = lambda *args, output=outputs[0], **kwargs: output
        try:
            yield
        finally:
            self._known = None
            for part, forward in before.items():
                vars(part).pop("forward", None)
                if forward is not None:
                    part.forward = forward

    def _forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = ExpertsCall(*args, *kwargs.values())
        noted, self._known = self._known, None
        if self._is_interrupting and noted is not None:
            noted.call = call.detached()
            raise Stop
        if torch.is_grad_enabled() and call.hidden_states.requires_grad:
            raise ValueError(
                "gradients are to go through experts that are read in blocks, of which none is left when they come: "
                "edit one layer with forget_loss='rmu' and retain_loss='embed_diff' or 'none', which end at it, or "
                "give a layer enough memory"
            )
        # Routers may draw lots: then what is known is of other experts.
        is_known = noted is not None and noted.call is not None and torch.equal(noted.call.index, call.index)
        if noted is None or not is_known:
            noted = Interrupted(call.detached())
            self.compute([noted])
        return add_up(call, cast(Tensor, noted.outputs), order=self.order)

    def _blocks(self, expert_indices: Sequence[int]) -> Iterator[tuple[Sequence[int], nn.Module]]:
        """Some experts at a time, with a module that holds them; the next ones are being read."""
        step = self._per_block
        parts = [expert_indices[start : start + step] for start in range(0, len(expert_indices), step)]
        if not parts:
            return
        ahead = self._residence.read_experts(self._names.values(), parts[0])
        for position, part in enumerate(parts, 1):
            read = self._placed(ahead.result())
            if position < len(parts):
                ahead = self._residence.read_experts(self._names.values(), parts[position])
            experts = self._holding(read, part)
            del read
            yield part, experts
            del experts

    def _placed(self, read: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stacks by their own names, where and in what they are computed with; those that were read are let go."""
        with torch.inference_mode(False):
            return {
                own_name: read.pop(name).to(self._residence.device, self._module.get_parameter(own_name).dtype)
                for own_name, name in self._names.items()
            }

    def _holding(self, stacks: dict[str, Tensor], expert_indices: Sequence[int]) -> nn.Module:
        """The module as if it had these experts alone."""
        own = shallow_copy(self._module)
        del own.__dict__["forward"]
        whole = {name: p for name, p in self._module._parameters.items() if p is not None}
        some = {name: stacks[name] if name in stacks else p.detach()[list(expert_indices)] for name, p in whole.items()}
        own._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in some.items()}
        cast(Any, own).num_experts = len(expert_indices)
        return own


def leave_on_disk(model: PreTrainedModel, residence: Residence, *, limit: int) -> dict[int, ExpertsOnDisk]:
    """Have layers come in without their routed experts, wherever these can be read by themselves.

    Args:
        model: Streamed.
        residence: Of its parts, none of which has been entered.
        limit: Bytes of memory for a layer and blocks of its experts.

    Returns:
        By decoder layer; empty where no layer's can.
    """
    blocks = [block for block in find_moe_blocks(model) if _can_be_apart(block, residence)]
    residence.leave_out({name for block in blocks for name in stack_names(block).values()})
    room = min(BLOCK_BYTES, max(0, limit - residence.least_bytes) // BLOCKS)
    return {block.layer_idx: ExpertsOnDisk(model, block, residence, block_bytes=room) for block in blocks}


def bytes_of_blocks(model: PreTrainedModel) -> int:
    """The least memory that reading experts in blocks takes beside the rest of a layer: one expert a block."""
    return BLOCKS * max(expert_bytes(block) for block in find_moe_blocks(model))


def expert_bytes(block: MoEBlock) -> int:
    """Memory of one expert as it is computed with."""
    stacks = [block.storage.module.get_parameter(name) for name in stack_names(block)]
    return sum(stack.numel() * stack.dtype.itemsize // block.num_experts for stack in stacks)


def stack_names(block: MoEBlock) -> dict[str, str]:
    """The parameters that hold experts' matrices: their names in the module, and in the model."""
    own = [name for name, p in block.storage.module._parameters.items() if p is not None and p.dim() == 3]
    return {name: f"{block.experts_name}.{name}" for name in own}


def _can_be_apart(block: MoEBlock, residence: Residence) -> bool:
    module, names = block.storage.module, stack_names(block)
    return (
        hasattr(module, "_is_expert_parallel")  # of modules that transformers' own ways of running experts run
        and not module._buffers
        and bool(names)
        and all(p is None or p.shape[:1] == (block.num_experts,) for p in module._parameters.values())
        and all(map(residence.can_read_experts, names.values()))
    )


def _large_parts(module: nn.Module, *, beside: set[nn.Module]) -> Iterator[nn.Module]:
    """The parts of a module that multiply by matrices, beside others that they are not to hold."""
    for part in module.children():
        if beside.intersection(part.modules()):
            if part not in beside:
                yield from _large_parts(part, beside=beside)
        elif any(p.dim() > 1 for p in part.parameters()):
            yield part
