"""Training under a retain projection: what is optimised is D, what the model holds is `Δ = D P`.

P damps directions that retain tokens take, see :mod:`uoe_peft.moments.projection`. The model's parameters are the plain
deltas at all times but inside an optimiser's step, so that files, merging and switching know nothing of it.

Letters: M slices in one parameter, R rank of a low-rank delta.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uoe_peft.data import Batch
from uoe_peft.moe import ListedExperts, find_moe_blocks
from uoe_peft.moments import (
    ROUTER,
    Moments,
    SliceMoments,
    SliceName,
    measure_moments,
    retain_projection,
    surviving_share,
)
from uoe_peft.tuner import UOELayer

logger = logging.getLogger(__name__)

MOMENTS_FILE, TRAINED_FILE = "retain_moments.safetensors", "projected_parameters.safetensors"
_SAMPLE_TOKENS = 100_000


@dataclass(frozen=True, eq=False)
class EditedParameter:
    """A trainable parameter of an adapter that stands on the input side of slices.

    Attributes:
        name: In the model.
        parameter: `uoe_delta`, shape `(M, *slice)`, or `uoe_A`, shape `(M, R, in)`.
        slices: What it edits, M of them.
        inputs_first: Whether its input dimension comes before its output dimension.
        partner: `uoe_B` of the same delta, shape `(M, out, R)`; None for a full one.
    """

    name: str
    parameter: nn.Parameter
    slices: tuple[SliceName, ...]
    inputs_first: bool
    partner: nn.Parameter | None

    def times(self, value: Tensor, matrices: Tensor) -> Tensor:
        """A value of the parameter with each slice's inputs multiplied. Shape of `matrices`: `(M, in, in)`."""
        precise = value.to(matrices.dtype)
        product = matrices @ precise if self.inputs_first else precise @ matrices  # the matrices are symmetric
        return product.to(value.dtype)


def edited_parameters(model: nn.Module) -> list[EditedParameter]:
    """The parameters that a projection acts on: of each trainable UOE delta the factor on the side of its input.

    Raises:
        ValueError: A parameter is sharded over processes.
    """
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    edited = []
    for layer, layer_idx, matrix in edited_layers(model):
        for adapter_name in layer.active_adapters:
            full = adapter_name in layer.uoe_delta
            store = dict((layer.uoe_delta if full else layer.uoe_A).items())
            for projection, parameter in cast(Any, store.get(adapter_name, {})).items():
                if parameter not in names:
                    continue
                _check_whole(names[parameter], parameter)
                slices = tuple(
                    SliceName(layer_idx, None if matrix == ROUTER else index, matrix or projection)
                    for index in layer.target_indices[adapter_name]
                )
                partner = None if full else cast(Any, layer.uoe_B[adapter_name])[projection]
                inputs_first = full and layer.is_transposed(projection)
                edited.append(EditedParameter(names[parameter], parameter, slices, inputs_first, partner))
    return edited


def edited_layers(model: nn.Module) -> Iterator[tuple[UOELayer, int, str | None]]:
    """Every layer of an adapter, its decoder layer, and its matrix where its projection does not name it."""
    for block in find_moe_blocks(model):
        if isinstance(block.router, UOELayer):
            yield block.router, block.layer_idx, ROUTER
        if isinstance(block.experts, UOELayer):
            yield block.experts, block.layer_idx, None
        if isinstance(block.storage, ListedExperts):
            for name, expert_idx in product(block.storage.projections, range(block.num_experts)):
                linear = block.storage.module.get_submodule(block.storage.linear_name(name, expert_idx))
                if isinstance(linear, UOELayer):
                    yield linear, block.layer_idx, name


def _check_whole(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, DTensor) or parameter.numel() == 0:
        raise ValueError(f"cannot project {name}: it is sharded over processes; train without FSDP or ZeRO-3")


def sampled_rows(dataset: Dataset, *, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of a tokenised set in random order, with their indices, until they hold enough tokens for moments."""
    num_tokens = 0
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    for index in order:
        if num_tokens >= _SAMPLE_TOKENS:
            return
        row = dataset[index]
        num_tokens += len(row["input_ids"])
        yield {**row, "index": index}


def moments_of_edits(model: nn.Module, batches: Iterable[Batch], *, name: str) -> Moments:
    """Moments of all slices that a model's adapter trains, over a set; errors as in `measure_moments`.

    A forget set, which is read for advice alone, need not reach the experts.
    """
    slices = {own for edited in edited_parameters(model) for own in edited.slices}
    experts = {(own.layer_idx, own.expert_idx) for own in slices if own.expert_idx is not None}
    routers = any(own.expert_idx is None for own in slices)
    return measure_moments(model, batches, sorted(experts), routers=routers, name=name, strict=name == "retain")


@dataclass(eq=False)
class _Projected:
    """A parameter while it is trained under a projection."""

    edited: EditedParameter
    matrices: Tensor  # P of each slice, (M, in, in)
    trained: Tensor  # D


class RetainProjection(TrainerCallback):
    """Keeps `Δ = D P` while any optimiser trains D.

    Gradients are multiplied by P as they come, so that clipping, accumulation and processes see those of D. Before a
    step the parameters become D, after it Δ again. Moments and D are kept in checkpoints.
    """

    def __init__(self, model: nn.Module, measure: Callable[[str], Moments], *, rho: float) -> None:
        """Project the deltas of a model's adapter.

        Args:
            model: The trained model, not what a launcher wraps it in.
            measure: Gives the moments of the "retain" and of the "forget" set; called when training begins anew.
            rho: See `retain_projection`.
        """
        self.model, self.rho = model, rho
        self._measure = measure
        self._moments: Moments | None = None
        self._trained: dict[str, Tensor] = {}  # D by name, as far as it is known
        self._projected: list[_Projected] = []
        self._handles: list[RemovableHandle] = []
        self._in_step = False

    def projection(self, retain: SliceMoments, forget: SliceMoments | None) -> Tensor:
        """P of one slice. Shape `(d, d)`, symmetric."""
        return retain_projection(retain, self.rho)

    def load(self, checkpoint: Path) -> None:
        """Take moments and D of a checkpoint.

        Raises:
            FileNotFoundError: The checkpoint was saved without a projection.
        """
        for name in (MOMENTS_FILE, TRAINED_FILE):
            if not (checkpoint / name).is_file():
                raise FileNotFoundError(f"{checkpoint} has no {name}: it was trained without retain_projection")
        self._moments = Moments.load(checkpoint / MOMENTS_FILE)
        self._trained = load_file(checkpoint / TRAINED_FILE)

    @torch.no_grad()
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure, unless a checkpoint did, and take over the parameters.

        Raises:
            ValueError: There is no trainable UOE delta, or the optimiser cannot be watched; and as in
                `measure_moments`.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not isinstance(inner, Optimizer):
            raise ValueError(f"retain_projection needs an optimiser of torch, got {type(inner).__name__}")
        self._let_go()  # where training begins anew with a smaller batch
        edited = edited_parameters(self.model)
        if not edited:
            raise ValueError(
                "retain_projection acts on UOE deltas, and the model has none that is trainable; pass "
                "peft_config=UOEConfig(...), or retain_projection=None"
            )
        forget = None
        if self._moments is None:
            self._moments, forget = self._measure("retain"), self._measure("forget")
        self._projected = [self._project(own, self._moments, forget) for own in edited]
        if forget is not None:
            self._advise(forget)
        for own in self._projected:
            hook = partial(own.edited.times, matrices=own.matrices)
            self._handles.append(own.edited.parameter.register_hook(hook))
        self._handles += [
            inner.register_step_pre_hook(lambda *_: self._show_trained()),
            inner.register_step_post_hook(lambda *_: self._show_deltas()),
        ]

    def _project(self, edited: EditedParameter, retain: Moments, forget: Moments | None) -> _Projected:
        parameter = edited.parameter
        found = [
            self.projection(retain.slices[own], None if forget is None else forget.slices.get(own))
            for own in edited.slices
        ]
        precise = torch.promote_types(parameter.dtype, torch.float32)
        # Of the first process: those of others may differ in the last bit, and then all steps after.
        matrices = cast(Tensor, broadcast(torch.stack(found).to(parameter.device, precise)))
        trained = self._trained.get(edited.name)
        if trained is None and edited.partner is not None and not edited.partner.any():
            trained = parameter.detach().clone()  # fresh: the first factor may change, their product stays 0
            parameter.copy_(edited.times(trained, matrices))
        elif trained is None:
            trained = edited.times(parameter.detach(), torch.linalg.inv(matrices))
        return _Projected(edited, matrices, trained.to(parameter))

    def _advise(self, forget: Moments) -> None:
        shares = {
            str(name): surviving_share(forget.slices[name], matrix.cpu())
            for own in self._projected
            for name, matrix in zip(own.edited.slices, own.matrices, strict=True)
            if name in forget.slices
        }
        lines = [f"{name}: {share:.0%}" for name, share in shares.items()]
        logger.info(
            "retain projection, rho %g, lets through of the forget tokens' energy: %s. Where little is left, forget "
            "tokens look like retain tokens: training needs a higher learning rate, and a projection may not pay",
            *(self.rho, "; ".join(lines)),
        )

    @torch.no_grad()
    def _show_trained(self) -> None:
        self._in_step = True
        for own in self._projected:
            own.edited.parameter.copy_(own.trained)

    @torch.no_grad()
    def _show_deltas(self) -> None:
        for own in self._projected:
            own.trained.copy_(own.edited.parameter)
            own.edited.parameter.copy_(own.edited.times(own.trained, own.matrices))
        self._in_step = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write moments and D into the checkpoint."""
        folder = Path(cast(str, args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and self._moments is not None and folder.is_dir():
            self._moments.save(folder / MOMENTS_FILE)
            trained = {own.edited.name: own.trained.cpu().contiguous() for own in self._projected}
            save_file(trained, str(folder / TRAINED_FILE))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the deltas in the model."""
        self.release()

    def release(self) -> None:
        """Let go of the parameters, which hold the deltas then, also where a step was interrupted."""
        self._let_go()
        self._trained, self._moments = {}, None

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._in_step:
            self._show_deltas()
        self._trained |= {own.edited.name: own.trained for own in self._projected}
        self._projected, self._handles = [], []
