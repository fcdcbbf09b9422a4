"""What is done to gradients of forgetting by those of keeping, before a step is taken: aids of `trials.py`.

f is the gradient of all that forgets (refusals, anchor and a simulated relearner's pass included), r that of keeping,
both weighted. A slice is an expert's matrix, or a router.

- "PCGrad" (https://arxiv.org/abs/2001.06782; r is never bent, as in https://arxiv.org/abs/2604.14808): in each slice
  where <f, r> < 0, `f <- f - <f, r> / <r, r> r`; the step is along f + r. The papers take whole tensors.
- "SAGO" (https://arxiv.org/abs/2604.14808, its published code): each coordinate takes r where the signs of f and r
  differ, and f alone elsewhere; "SAGO, sum", a variant there: f + r elsewhere.
- "GRU" (https://arxiv.org/abs/2503.09117): all weights as one vector, against a running mean of r,
  `m <- 0.8 r + 0.2 m`; where <f, m> < 0, `f <- f - <f, m> / <m, m> m`. Its step is along f alone; "GRU, sum": f + r.
- "RepSelect" (https://arxiv.org/abs/2606.17168): `U S V'` are the first q singular triplets of the gradient of a set's
  likelihood, of each slice at the base; with `s = S / min S`, `f <- f - f V (1 - 1/s) V'`, and so with U from the left.
  "Of forget" is what the paper reports, "of retain" the later default of its code; q is a quarter of the smaller
  dimension (there about an eighth). Departures: f is of each step's loss, r is added, Adam takes the steps, and no
  adapter learns the answers beforehand. `one_step` is nearer to the paper: no training, one step along the filtered f.
- `damped_outputs`: a retain projection from both sides, after K-FAC (https://arxiv.org/abs/1503.05671; for unlearning
  https://arxiv.org/abs/2602.10568): `delta = L D P`, P the package's, `L = (I + G / (rho g))^-1`, G the second moments
  of gradients at a slice's outputs over the retain set, of answers that are drawn from the model itself, g the mean of
  its eigenvalues. Departures: D is trained by Adam, and the two sides are damped apart, as P is.
- WAGLE (https://arxiv.org/abs/2410.17509) needs nothing here: `weight_mask_ratio` has the score of its published code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from learning_to_unlearn import Gradients, gradients_apart
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from trials_training import Aid, AidedTrainer

from uoe_peft.data import Batch
from uoe_peft.losses import token_log_probs
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moments import ROUTER, SliceMoments, SliceName, retain_projection
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.optim.masks import _mean_gradients
from uoe_peft.training.optim.projection import (
    EditedParameter,
    RetainProjection,
    edited_parameters,
    sampled_rows,
)
from uoe_peft.tuner import UOELayer

Triplets = tuple[Tensor, Tensor, Tensor]
RUNNING = 0.8  # share of the newest retain gradient in GRU's mean
FEWER = 4  # RepSelect takes so many times fewer directions than a slice has
LIMIT = 0.02  # by which `one_step` lets the retain set's negative log-likelihood of a token rise


class SurgicalTrainer(AidedTrainer):
    """An `AidedTrainer` that takes gradients apart, or trains deltas that are damped from both sides.

    Args:
        aid: Which aids.
        **kwargs: The trainer's.
    """

    def __init__(self, *, aid: Aid, **kwargs: Any) -> None:
        super().__init__(aid=aid, **kwargs)
        self._running: Gradients | None = None
        self._selective: list[Triplets] = []
        if aid.damped_outputs is not None:
            self.add_callback(BothSides(self, rho=aid.damped_outputs))

    def rows_of(self, role: str) -> Iterator[Batch]:
        """A sample of a set, in batches as large as those of training."""
        rows = sampled_rows(self.train_dataset.sets[role], seed=self.args.seed)
        return (self._prepare_inputs(batch) for batch in self.reuse.rows.batches(role, rows))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, or take a single step."""
        role = self.aid.one_step or (self.aid.surgery or "").removeprefix("RepSelect of ")
        if self.aid.one_step or role in ("forget", "retain"):
            self._selective = [leading(gradient) for gradient in self._likelihood_gradients(role)]
        return one_step(self, self._selective) if self.aid.one_step else super().train(*args, **kwargs)

    def _likelihood_gradients(self, role: str) -> Gradients:
        """Of the mean negative log-likelihood of a set's answer tokens."""
        with evaluation_mode(self.model, gradients=True):
            found = _mean_gradients(self.model, self.rows_of(role), self._trained)
        return [found[weight] for weight in self._trained]

    def _record(self, step: Any, batches: Any) -> None:
        self._terms = step.terms
        super()._record(step, batches)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The trainer's own step, or the two gradients apart and then what the surgery makes of them."""
        if self.aid.surgery is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        batches = self._prepare_inputs(inputs)
        loss = self.compute_loss(model, batches, num_items_in_batch=num_items_in_batch)
        forget, retain = gradients_apart(self.args, self._terms, self._trained)
        if self.args.relearner_steps:
            self._forget_relearned(model, {role: batch for role, batch in batches.items() if role != "retain"})
            forget = [own + weight.grad for own, weight in zip(forget, self._trained, strict=True)]
        for weight, gradient in zip(self._trained, self._operated(forget, retain), strict=True):
            weight.grad = gradient
        return loss.detach()

    def _operated(self, forget: Gradients, retain: Gradients) -> Gradients:
        match self.aid.surgery:
            case "PCGrad":
                return [without_conflict(f, r) + r for f, r in zip(forget, retain, strict=True)]
            case "SAGO":
                return [torch.where(f * r < 0, r, f) for f, r in zip(forget, retain, strict=True)]
            case "SAGO, sum":
                return [torch.where(f * r < 0, r, f + r) for f, r in zip(forget, retain, strict=True)]
            case "GRU" | "GRU, sum" as kind:
                before = self._running or [torch.zeros_like(r) for r in retain]
                self._running = [RUNNING * r + (1 - RUNNING) * m for r, m in zip(retain, before, strict=True)]
                rectified = without_conflict_as_one(forget, self._running)
                return rectified if kind == "GRU" else [f + r for f, r in zip(rectified, retain, strict=True)]
            case _:
                parts = zip(forget, retain, self._selective, strict=True)
                return [collapsed(f, triplets) + r for f, r, triplets in parts]


def without_conflict(forget: Tensor, retain: Tensor) -> Tensor:
    """The forget gradient without what its slices have against the retain gradient. Shapes `(M, ...)`."""
    dims = tuple(range(1, forget.dim()))
    product = (forget * retain).sum(dims, keepdim=True).clamp(max=0)
    return forget - product / retain.square().sum(dims, keepdim=True).clamp(min=1e-30) * retain


def without_conflict_as_one(forget: Gradients, retain: Gradients) -> Gradients:
    """Likewise with all weights as one vector."""
    product = torch.stack([(f * r).sum() for f, r in zip(forget, retain, strict=True)]).sum().clamp(max=0)
    share = product / torch.stack([r.square().sum() for r in retain]).sum().clamp(min=1e-30)
    return [f - share * r for f, r in zip(forget, retain, strict=True)]


def leading(gradient: Tensor) -> Triplets:
    """First singular triplets of each slice: U, the shares `min S / S` that are left of them, V.

    Args:
        gradient: Shape `(M, out, in)`.

    Returns:
        Shapes `(M, out, q)`, `(M, q)` and `(M, in, q)`.
    """
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    q = max(1, min(gradient.shape[1:]) // FEWER)
    least = s[:, q - 1 : q]
    return u[..., :q], torch.where(s[:, :q] > 0, least / s[:, :q], 1.0), v.mT[..., :q]


def collapsed(gradient: Tensor, triplets: Triplets) -> Tensor:
    """A gradient whose parts along leading directions are shrunk, on both sides. Shapes `(M, out, in)`."""
    u, left, v = triplets
    gradient = gradient - (gradient @ v * (1 - left)[:, None]) @ v.mT
    return gradient - u @ ((1 - left)[..., None] * (u.mT @ gradient))


@torch.no_grad()
def one_step(trainer: SurgicalTrainer, selective: Sequence[Triplets]) -> None:
    """Experts move against the likelihood of the forget set, along its filtered gradient, as far as retain rows allow.

    The length is found by doubling and bisection. Routers stay as they are, as in the paper.
    """
    experts = {
        edited.parameter for edited in edited_parameters(trainer.model) if edited.slices[0].expert_idx is not None
    }
    with torch.enable_grad():
        found = trainer._likelihood_gradients("forget")
    parts = zip(trainer._trained, found, selective, strict=True)
    directions = {weight: collapsed(gradient, triplets) for weight, gradient, triplets in parts if weight in experts}
    norm = torch.stack([direction.norm() for direction in directions.values()]).norm()
    asked = list(itertools.islice(trainer.rows_of("retain"), 25))

    def nll(length: float) -> float:
        for weight, direction in directions.items():
            weight.copy_(length / norm * direction)
        said = torch.cat([forward_answers(trainer.model, batch).log_probs for batch in asked])
        return -float(said.mean())

    limit, low, high = nll(0.0) + LIMIT, 0.0, 0.1
    while nll(high) < limit and high < 1e4:
        low, high = high, 2 * high
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if nll(middle) < limit else (low, middle)
    nll(low)


@dataclass(frozen=True, eq=False)
class TwoSided(EditedParameter):
    """An `EditedParameter` that is multiplied on the side of its outputs, too: by `left`, shape `(M, out, out)`."""

    left: Tensor

    def times(self, value: Tensor, matrices: Tensor) -> Tensor:
        """A value with inputs and outputs of each slice multiplied."""
        left = self.left.to(value)
        return super().times(value @ left if self.inputs_first else left @ value, matrices)


class BothSides(RetainProjection):
    """Keeps `delta = L D P` of full deltas while any optimiser trains D, which begins at 0.

    Args:
        trainer: Has the retain rows.
        rho: See `retain_projection`.
    """

    def __init__(self, trainer: SurgicalTrainer, *, rho: float) -> None:
        super().__init__(trainer.model, trainer._measure, rho=rho)
        self._rows = trainer.rows_of
        self._outputs: dict[SliceName, Tensor] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Measure outputs, and as in the base class inputs."""
        self._outputs = output_moments(self.model, self._rows("retain"))
        super().on_train_begin(*args, **kwargs)

    def _project(self, edited: EditedParameter, retain: Any, forget: Any) -> Any:
        left = torch.stack([self._damped(self._outputs[name]) for name in edited.slices])
        return super()._project(TwoSided(**vars(edited), left=left), retain, forget)

    def _damped(self, second: Tensor) -> Tensor:
        return retain_projection(SliceMoments(second.new_zeros(len(second)), second, 1), self.rho)


class OutputGradients(TorchFunctionMode):
    """Sums up second moments of gradients at the outputs of a model's products with edited matrices.

    Of a base that is frozen these are the only products with a matrix that has a gradient, and every pass has them in
    the same order.

    Args:
        names: The slices in that order.
    """

    def __init__(self, names: Sequence[SliceName]) -> None:
        super().__init__()
        self.names, self.seen = names, 0
        self.sums: dict[SliceName, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Watch a product's output."""
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear" and args[1].requires_grad:
            name = self.names[self.seen % len(self.names)]
            out.register_hook(lambda gradient: self._add(name, gradient.flatten(0, -2).double()))
            self.seen += 1
        return out

    def _add(self, name: SliceName, gradients: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + gradients.T @ gradients


def output_moments(model: nn.Module, batches: Iterable[Batch]) -> dict[SliceName, Tensor]:
    """G of every edited slice up to a factor: `sum_t d_t d_t'`, d_t the gradient at its output for a token t.

    Of the negative log-likelihood of answer tokens that are drawn from the model, given each batch's own before them.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    with evaluation_mode(model, gradients=True), OutputGradients(edited_products(model)) as watched:
        for batch in batches:
            before = watched.seen
            logits = forward_answers(model, batch).logits
            drawn = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
            torch.autograd.grad(-token_log_probs(logits, drawn).sum(), trained, allow_unused=True)
            assert watched.seen == before + len(watched.names), "a pass has other products than those of edited slices"
    return {name: second.float() for name, second in watched.sums.items()}


def edited_products(model: nn.Module) -> list[SliceName]:
    """Edited slices in the order of a forward pass: of each layer the router, and then expert by expert."""
    names = []
    for block in find_moe_blocks(model):
        if isinstance(block.router, UOELayer):
            names.append(SliceName(block.layer_idx, None, ROUTER))
        if isinstance(block.experts, UOELayer):
            indices = sorted(block.experts.target_indices["default"])
            names += [SliceName(block.layer_idx, i, p) for i in indices for p in block.storage.projections]
    return names
