"""What `trials.py` adds to a training: other starts, and forget passes through a model that was weakened on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from uoe_peft import UnlearningTrainer, find_moe_blocks
from uoe_peft.moe.interventions import silence_expert
from uoe_peft.tuner.layer import UOEExpertsLayer

Pairs = list[tuple[int, int]]
Surgery = Literal["PCGrad", "SAGO", "SAGO, sum", "GRU", "GRU, sum", "RepSelect of forget", "RepSelect of retain"]
RetainData = Literal["own answers", "own text", "own text alone", "WikiText"]


@dataclass(frozen=True)
class Aid:
    """What a training gets beside its losses.

    Attributes:
        start: The edited experts begin as they are, as the mean of their layer's others, or as noise of their size.
        knocked_out: Every step has a second forget pass in which edited experts, half of them on average and never
            all of several, are silent or have their old weights.
        forget_share: Share of the steps that forget; in the rest only the retain loss is left.
        average_from: Share of the steps after which weights are averaged; 1: the last ones are taken.
        surgery: What is done to gradients of forgetting by those of keeping, see `trials_surgery.py`.
        one_step: A single step along the filtered gradient of this set's likelihood in the place of training.
        damped_outputs: rho of a retain projection from both sides.
        retain_data: What is kept beside or in the place of the retain rows, see `trials_data.py`.
    """

    start: Literal["base", "others", "noise"] = "base"
    knocked_out: bool = False
    forget_share: float = 1.0
    average_from: float = 1.0
    surgery: Surgery | None = None
    one_step: Literal["forget", "retain"] | None = None
    damped_outputs: float | None = None
    retain_data: RetainData | None = None


class AidedTrainer(UnlearningTrainer):
    """An `UnlearningTrainer` with aids.

    Args:
        aid: Which.
        experts: Those that are edited; empty for other methods.
        **kwargs: The trainer's.
    """

    def __init__(self, *, aid: Aid, experts: Pairs, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.aid = aid
        self._experts = experts
        self._draw = random.Random(self.args.seed)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        set_start(self.model, aid.start, seed=self.args.seed)
        if aid.average_from < 1:
            self.add_callback(Average(self._trained, aid.average_from))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The trainer's own step, and the second forget pass."""
        if self.state.global_step >= self.aid.forget_share * self.args.max_steps:
            self.args.forget_weight = self.args.alternative_weight = 0.0
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.aid.knocked_out and self.args.forget_weight:
            again = {role: batch for role, batch in self._prepare_inputs(inputs).items() if role != "retain"}
            with knocked_out(model, self._experts, self._draw), self._reusing(again):
                self.objective.step(model, again, self._trace, self._step.counts).loss(self.args).backward()
        return loss


@contextmanager
def knocked_out(model: nn.Module, experts: Pairs, draw: random.Random) -> Iterator[None]:
    """Inside the context some edited experts are silent, others as they were; of several at least one stays edited."""
    out = [pair for pair in experts if draw.random() < 0.5]
    if len(out) == len(experts) and len(experts) > 1:
        out.remove(draw.choice(out))
    blocks = {block.layer_idx: block for block in find_moe_blocks(model)}
    with ExitStack() as stack:
        for layer_idx, expert_idx in out:
            block = blocks[layer_idx]
            silent = draw.random() < 0.5
            stack.enter_context(
                silence_expert(block, expert_idx) if silent else old_weights(block.experts, {expert_idx})
            )
        yield


@contextmanager
def old_weights(experts: Any, indices: set[int]) -> Iterator[None]:
    """Inside the context these experts have the weights of the base model."""
    edited: Callable[[Any], dict[Any, Any]] = experts.edited_keys
    experts.edited_keys = lambda adapters: {k: names for k, names in edited(adapters).items() if k[1] not in indices}
    try:
        yield
    finally:
        experts.edited_keys = edited


@torch.no_grad()
def set_start(model: nn.Module, start: str, *, seed: int) -> None:
    """Set the deltas such that the edited experts begin as the mean of their layer's others, or as noise."""
    noise = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if start == "base" or not isinstance(layer, UOEExpertsLayer):
            continue
        edited = layer.target_indices["default"]
        for projection, index in layer.edited_keys(["default"]):
            own, stack = layer.base_slice(projection, index), layer.base_parameter(projection, index)
            others = [e for e in range(len(stack)) if e not in edited]
            new = stack[others].mean(0) if start == "others" else torch.randn(own.shape, generator=noise) * own.std()
            layer.set_delta_weight("default", projection, index, new - own)


class Average(TrainerCallback):
    """Ends training with the mean of the weights that it had from a share of its steps on."""

    def __init__(self, trained: list[nn.Parameter], start: float) -> None:
        self._trained, self._start = trained, start
        self._count = 0
        self._means = [torch.zeros_like(parameter) for parameter in trained]

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the weights in if it is time."""
        if state.global_step > self._start * args.max_steps:
            self._count += 1
            for mean, parameter in zip(self._means, self._trained, strict=True):
                mean.lerp_(parameter, 1 / self._count)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the mean in place."""
        for mean, parameter in zip(self._means, self._trained, strict=True):
            parameter.copy_(mean)
