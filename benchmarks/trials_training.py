"""What `trials.py` adds to a training: other starts, and forget passes through a model that was weakened on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Aid:
    """What a training gets beside its losses.

    Attributes:
        start: The edited experts begin as they are, as the mean of their layer's others, or as noise of their size.
        knocked_out: Every step has a second forget pass in which edited experts, half of them on average and never
            all of several, are silent or have their old weights.
        adversary: Every step has a second forget pass through weights that an adversary moved: AdamW on the forget
            answers, one step of its own after each, on all weights that the model has. It begins anew after so many
            steps. 0: there is none.
        sharpness: The second forget pass is where the answers' likelihood rises fastest, so far from all weights.
        forget_share: Share of the steps that forget; in the rest only the retain loss is left.
        average_from: Share of the steps after which weights are averaged; 1: the last ones are taken.
    """

    start: Literal["base", "others", "noise"] = "base"
    knocked_out: bool = False
    adversary: int = 0
    sharpness: float = 0.0
    forget_share: float = 1.0
    average_from: float = 1.0

    @property
    def weakens(self) -> bool:
        """Whether steps have a second forget pass."""
        return self.knocked_out or self.adversary > 0 or self.sharpness > 0

    @property
    def moves_all_weights(self) -> bool:
        """Whether what enters the lowest edited layer changes from step to step."""
        return self.adversary > 0 or self.sharpness > 0


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
        self._adversary = Adversary(self.model) if aid.moves_all_weights else None
        if aid.average_from < 1:
            self.add_callback(Average(self._trained, aid.average_from))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The trainer's own step, and the second forget pass."""
        if self.state.global_step >= self.aid.forget_share * self.args.max_steps:
            self.args.forget_weight = self.args.alternative_weight = 0.0
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.aid.weakens and self.args.forget_weight:
            again = {role: batch for role, batch in self._prepare_inputs(inputs).items() if role != "retain"}
            self._forget_again(model, again)
        return loss

    def _forget_again(self, model: nn.Module, batches: dict[str, Any]) -> None:
        adversary = self._adversary
        if adversary is None:
            with knocked_out(model, self._experts, self._draw):
                self._forget(model, batches).loss(self.args).backward()
            return
        if self.aid.sharpness:
            adversary.reset()
            with adversary.applied():
                adversary.climb(self._forget(model, batches).outputs.log_probs.mean(), self.aid.sharpness)
        elif self.state.global_step % self.aid.adversary == 0:
            adversary.reset()
        with adversary.applied():
            step = self._forget(model, batches)
            gradients = torch.autograd.grad(
                step.loss(self.args), self._trained, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if self.aid.adversary:
                adversary.attack(step.outputs.log_probs.mean())
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _forget(self, model: nn.Module, batches: dict[str, Any]) -> Any:
        with self._reusing(batches):
            return self.objective.step(model, batches, self._trace, self._step.counts)


class Adversary:
    """Offsets of a model's weights, of all those that training does not move, or of all where it moves all."""

    def __init__(self, model: nn.Module, *, rate: float = 2e-4) -> None:
        # Moving a frozen slice of an edited expert moves the edited slice as far: its delta is added to it.
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self._weights = frozen or list(model.parameters())
        self._rate = rate
        self.reset()

    def reset(self) -> None:
        """Back to the model's own weights."""
        self._offsets = [torch.zeros_like(weight, requires_grad=True) for weight in self._weights]
        self._optimizer = torch.optim.AdamW(self._offsets, lr=self._rate, weight_decay=0.0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the model has the moved weights, and they have gradients."""
        before = [(weight, weight.detach().clone(), weight.requires_grad) for weight in self._weights]
        for weight, offset in zip(self._weights, self._offsets, strict=True):
            weight.data.add_(offset.detach())
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight, own, trained in before:
                weight.data.copy_(own)
                weight.requires_grad_(trained)

    def attack(self, likelihood: Tensor) -> None:
        """One step of AdamW towards a higher likelihood; holds for the next time."""
        for offset, gradient in zip(self._offsets, self._gradients(likelihood), strict=True):
            offset.grad = -gradient
        self._optimizer.step()

    def climb(self, likelihood: Tensor, radius: float) -> None:
        """As far as `radius`, in Euclidean length, where the likelihood rises fastest."""
        gradients = self._gradients(likelihood)
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        self._offsets = [gradient * (radius / length) for gradient in gradients]

    def _gradients(self, likelihood: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(likelihood, self._weights, allow_unused=True, materialize_grads=True)


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
