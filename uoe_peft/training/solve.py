"""Unlearning without training: an ordinary adapter, solved for instead of trained.

Letters: O output size of a slice, d its input size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.attribution import attribute_experts
from uoe_peft.attribution.sampling import SampleBatches, sample_batches
from uoe_peft.data import Batch
from uoe_peft.data.tokenization import ProcessingClass
from uoe_peft.evaluation.metrics import greatest_scale
from uoe_peft.losses import control_direction
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.passes import run_passes
from uoe_peft.moments import Moments, SliceName, measure_moments, ridge_delta, steering_change
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.optim.projection import EditedParameter, edited_parameters
from uoe_peft.tuner import UOEConfig

logger = logging.getLogger(__name__)

SolveTarget = Literal["direction", "gradient", "zero"]

_VALIDATION = 5  # one row of so many chooses the strength instead of being solved for
_TOLERANCE = 1 / 64  # of the strength


def solve_unlearning(
    model: PreTrainedModel,
    forget_dataset: Dataset | IterableDataset,
    retain_dataset: Dataset | IterableDataset,
    *,
    processing_class: ProcessingClass,
    target_experts: str | Iterable[tuple[int, int]] = "auto",
    target: SolveTarget = "direction",
    coefficient: float = 5.0,
    retain_weight: float = 3.0,
    ridge: float = 1e-3,
    keep_retain: float = 0.97,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    max_length: int | None = 512,
    seed: int = 0,
    show_progress: bool = True,
) -> PeftModel:
    """A model with a UOE adapter that forgets a set, from a few forward passes over it and over what is to be kept.

    The delta of each expert's last matrix W is a ridge regression, see :mod:`uoe_peft.moments.ridge`: forget tokens'
    outputs move to a target, retain tokens' outputs stay. Routers and other matrices are left alone. Then the deltas
    are scaled by the greatest strength in [0, 1] that bisection finds to keep the retain set, measured on a fifth of
    the rows that nothing was solved for.

    Args:
        model: A causal language model with routed experts, without an adapter.
        forget_dataset: What is to be forgotten, in any of TRL's dataset types.
        retain_dataset: What is to be kept, likewise.
        processing_class: Tokenizer, or a processor that holds one.
        target_experts: `(layer_idx, expert_idx)` pairs; "auto": the one that the forget set engages most.
        target: Where forget tokens' outputs go at strength 1. "direction": to one point along RMU's random direction.
            "gradient": up the slope of the answers' cross-entropy, which takes a backward pass. "zero": to 0, which
            forgets little.
        coefficient: How far, as a multiple of the outputs' root mean square norm, > 0; not for "zero".
        retain_weight: How much more retain tokens count than forget tokens, >= 0.
        ridge: Damping, > 0, as a share of the mean eigenvalue.
        keep_retain: Share of the base model's token accuracy on the retain set that must be kept, in (0, 1].
        max_tokens: Size of the sample of each set in tokens.
        batch_size: Sequences in a batch.
        max_length: Longest sequence in tokens; None for no limit.
        seed: Of the samples and of the direction.
        show_progress: Whether to show progress bars.

    Returns:
        The model in an adapter of full deltas, in evaluation mode.

    Warns:
        UserWarning: Few retain tokens reach an expert, see `measure_moments`.

    Raises:
        UnsupportedModelError: The model has no routed experts, or cannot be watched.
        ValueError: The model has an adapter; a number is out of range; an unknown target or expert; a set has fewer
            than two rows, cannot be used, or does not reach an expert.
    """
    _check(model, target=target, coefficient=coefficient, keep_retain=keep_retain)
    reading = {"max_tokens": max_tokens, "batch_size": batch_size, "max_length": max_length, "seed": seed}
    sets = {"forget": forget_dataset, "retain": retain_dataset}
    solved = {
        name: _split(sample_batches(rows, processing_class, name=name, **cast(Any, reading)), name)
        for name, rows in sets.items()
    }
    config = UOEConfig(target_experts=target_experts, train_router=False)
    if config.target_experts == "auto":
        attribution = attribute_experts(
            model,
            forget_dataset,
            processing_class=processing_class,
            retain_dataset=retain_dataset,
            show_progress=show_progress,
            **cast(Any, reading),
        )
        config = replace(config, target_experts=attribution.top(1), attribution=attribution.metadata())
    config.target_projections = _last_projections(model, config.target_experts)
    peft_model = cast(PeftModel, get_peft_model(model, config)).eval()
    try:
        moments = {
            name: measure_moments(
                peft_model, rows, config.target_experts, routers=False, name=name, show_progress=show_progress
            )
            for name, (rows, _) in solved.items()
        }
        edited = edited_parameters(peft_model)
        changes = _changes(peft_model, edited, moments["forget"], solved["forget"][0], target, coefficient, seed)
        _write(edited, changes, moments, retain_weight=retain_weight, ridge=ridge)
        if target == "gradient":
            _set_reach(peft_model, edited, moments["forget"], coefficient)
        held_out = {name: rows for name, (_, rows) in solved.items()}
        _choose_strength(peft_model, edited, held_out, keep_retain=keep_retain)
    except BaseException:
        peft_model.unload()  # the model is as it came
        raise
    return peft_model


def _check(model: nn.Module, *, target: str, coefficient: float, keep_retain: float) -> None:
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already; pass the base model, model.unload()")
    if target not in get_args(SolveTarget):
        raise ValueError(f"target must be one of {get_args(SolveTarget)}, got {target!r}")
    if not 0 < coefficient < float("inf"):
        raise ValueError(f"coefficient must be > 0 and finite, got {coefficient}")
    if not 0 < keep_retain <= 1:
        raise ValueError(f"keep_retain must be in (0, 1], got {keep_retain}")


def _last_projections(model: nn.Module, experts: Sequence[tuple[int, int]]) -> list[str]:
    """The matrix that writes an expert's output, in each of the layers; unknown layers are the adapter's to refuse."""
    layers = {layer_idx for layer_idx, _ in experts}
    return sorted({b.storage.projections[-1] for b in find_moe_blocks(model) if b.layer_idx in layers}) or ["down_proj"]


def _split(sample: SampleBatches, name: str) -> tuple[SampleBatches, SampleBatches]:
    """Rows to solve for, and rows that choose the strength; both are spread over all lengths."""
    rows = list(sample.examples)
    if len(rows) < 2:
        raise ValueError(f"the {name} set has one row; expected at least two, of which one chooses the strength")
    fitted = [row for place, row in enumerate(rows) if place % _VALIDATION]
    return replace(sample, examples=fitted), replace(sample, examples=rows[::_VALIDATION])


def _changes(
    model: PeftModel,
    edited: Sequence[EditedParameter],
    forget: Moments,
    batches: SampleBatches,
    target: SolveTarget,
    coefficient: float,
    seed: int,
) -> dict[SliceName, Tensor]:
    """What `ridge_delta` needs of each slice. Shape `(O, d)`."""
    if target == "gradient":
        return _loss_gradients(model, edited, batches)
    changes = {}
    for name, weight in _weights(model, edited).items():
        direction = control_direction(len(weight), seed=seed) if target == "direction" else None
        changes[name] = steering_change(weight, forget.slices[name], direction=direction, coefficient=coefficient)
    return changes


def _weights(model: PeftModel, edited: Sequence[EditedParameter]) -> dict[SliceName, Tensor]:
    """The base matrix of each slice. Shape `(O, d)`."""
    storages = {block.layer_idx: block.storage for block in find_moe_blocks(model)}
    weights = {}
    for own in edited:
        for name in own.slices:
            weight = storages[name.layer_idx].weight(name.projection, cast(int, name.expert_idx)).detach()
            weights[name] = weight.T if own.inputs_first else weight
    return weights


def _loss_gradients(
    model: PeftModel, edited: Sequence[EditedParameter], batches: SampleBatches
) -> dict[SliceName, Tensor]:
    """Gradients of the answers' summed cross-entropy with respect to each slice. Shape `(O, d)`."""
    parameters = [own.parameter for own in edited]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        loss = -forward_answers(model, _on_device(model, batch)).log_probs.sum()
        for sums, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            sums += gradient
    return {
        name: sums[position].T if own.inputs_first else sums[position]
        for own, sums in zip(edited, total, strict=True)
        for position, name in enumerate(own.slices)
    }


@torch.no_grad()
def _write(
    edited: Sequence[EditedParameter],
    changes: Mapping[SliceName, Tensor],
    moments: Mapping[str, Moments],
    *,
    retain_weight: float,
    ridge: float,
) -> None:
    """Solve for the delta of each slice and put it into its parameter."""
    for own in edited:
        for position, name in enumerate(own.slices):
            forget, retain = (moments[role].slices[name] for role in ("forget", "retain"))
            delta = ridge_delta(changes[name].cpu(), forget, retain, retain_weight=retain_weight, ridge=ridge)
            own.parameter[position] = (delta.T if own.inputs_first else delta).to(own.parameter)


@torch.no_grad()
def _set_reach(model: PeftModel, edited: Sequence[EditedParameter], forget: Moments, coefficient: float) -> None:
    """Scale all deltas alike, so that the one that moves its outputs furthest moves them by `coefficient`."""
    reach = 0.0
    for name, weight in _weights(model, edited).items():
        own = next(own for own in edited if name in own.slices)
        stored = own.parameter[own.slices.index(name)]
        delta = stored.T if own.inputs_first else stored
        moved, now = (_energy(matrix, forget.slices[name].second) for matrix in (delta, weight))
        reach = max(reach, (moved / now) ** 0.5 if now > 0 else 0.0)
    for own in edited:
        own.parameter.mul_(coefficient / reach if reach > 0 else 0.0)


def _energy(matrix: Tensor, second: Tensor) -> float:
    """`tr(M C Mᵀ)`: mean squared norm of what a matrix makes of tokens."""
    precise = matrix.double().cpu()
    return float(((precise @ second.double()) * precise).sum())


@torch.no_grad()
def _choose_strength(
    model: PeftModel, edited: Sequence[EditedParameter], held_out: dict[str, SampleBatches], *, keep_retain: float
) -> None:
    """Scale the deltas by the greatest strength that bisection finds to keep the retain set."""
    full = [own.parameter.detach().clone() for own in edited]

    def accuracy_at(strength: float, name: str) -> float:
        for own, value in zip(edited, full, strict=True):
            own.parameter.copy_(value * strength)
        return _accuracy(model, held_out[name])

    base = {name: accuracy_at(0.0, name) for name in held_out}
    kept = greatest_scale(lambda s: accuracy_at(s, "retain"), keep_retain * base["retain"], tolerance=_TOLERANCE)
    strength = kept.scale or 0.0
    after = {name: accuracy_at(strength, name) for name in held_out}  # leaves the deltas at this strength
    logger.info(
        "strength %.3f: token accuracy on held-out rows, forget %.3f -> %.3f, retain %.3f -> %.3f",
        *(strength, base["forget"], after["forget"], base["retain"], after["retain"]),
    )
    if strength == 0:
        logger.warning(
            "no strength keeps %.0f %% of the retain accuracy, so the adapter changes nothing; raise retain_weight, "
            "lower keep_retain or choose other experts",
            100 * keep_retain,
        )


def _accuracy(model: PeftModel, batches: SampleBatches) -> float:
    """Share of the answer tokens of a sample that are the most likely ones."""
    right = total = 0.0
    with evaluation_mode(model):
        for (accuracy, num_tokens), _ in run_passes(model, (partial(_read_answers, model, batch) for batch in batches)):
            right += accuracy * num_tokens
            total += num_tokens
    return right / max(total, 1)


def _read_answers(model: PeftModel, batch: Batch) -> tuple[float, int]:
    """Share of a batch's answer tokens that are the most likely ones, and their number."""
    outputs = forward_answers(model, _on_device(model, batch))
    return float(outputs.accuracy), len(outputs.targets)


def _on_device(model: PeftModel, batch: Batch) -> Batch:
    return {name: value.to(model.device) for name, value in batch.items()}
