"""One pass over a set: moments of what edited slices are multiplied with."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from uoe_peft.data import Batch
from uoe_peft.moe import MoEBlock
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.inputs.routers import record_router_input
from uoe_peft.moe.inputs.slices import ExpertInputs, record_expert_inputs
from uoe_peft.moe.interventions import run_until_routed
from uoe_peft.moe.passes import Pass, run_passes
from uoe_peft.moe.routing import select_blocks
from uoe_peft.moments.moments import ROUTER, Moments, SliceMoments, SliceName


class _Sums:
    """Sums over tokens of one slice, in float64."""

    def __init__(self, dimension: int, device: torch.device) -> None:
        self.first = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.second = torch.zeros(dimension, dimension, dtype=torch.float64, device=device)
        self.num_tokens = 0

    def add(self, weighted: Tensor) -> None:
        """Take in tokens. Shape `(N, d)`."""
        rows = weighted.double()
        self.first += rows.sum(dim=0)
        self.second.addmm_(rows.T, rows)
        self.num_tokens += len(rows)


def measure_moments(
    model: nn.Module,
    batches: Iterable[Batch],
    target_experts: Iterable[tuple[int, int]],
    *,
    routers: bool = True,
    name: str = "retain",
    strict: bool = True,
    show_progress: bool = False,
) -> Moments:
    """Moments of what single experts' matrices and their routers are multiplied with, over a set.

    One forward pass that ends at the highest of the layers; its memory does not grow with the set. An adapter on the
    model takes part in what enters a layer and in its routing; measure a fresh adapter, or with the adapter disabled.

    Args:
        model: A model with routed experts, wrapped by PEFT or not.
        batches: The set, as batches with `input_ids` and `attention_mask`; padding never counts.
        target_experts: `(layer_idx, expert_idx)` pairs, at least one.
        routers: Whether the routers of their layers are measured, too.
        name: What messages call the set.
        strict: Whether an expert that no token reaches is an error, and too few tokens a warning; otherwise slices
            without tokens are left out of the result.
        show_progress: Whether to show a progress bar.

    Returns:
        Moments of every matrix of each expert, over the tokens routed to it; of routers over all tokens.

    Warns:
        UserWarning: Fewer tokens reach a slice than it has dimensions: directions that only others take count as free.

    Raises:
        UnsupportedModelError: The model has no routed experts, is an encoder-decoder, or cannot be watched.
        ValueError: No or an unknown expert; no batches; no token of the set reaches an expert; an input is NaN or
            infinite.
    """
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer_idx, expert_idx in target_experts:
        by_layer[int(layer_idx)].append(int(expert_idx))
    if not by_layer:
        raise ValueError("target_experts is empty; name at least one (layer_idx, expert_idx) pair")
    blocks = select_blocks(model, list(by_layer))
    with tqdm(desc=f"Reading {name} set", unit="tok", unit_scale=True, disable=not show_progress) as bar:
        sums, num_tokens = _read(model, batches, blocks, by_layer, routers=routers, bar=bar)
    if not num_tokens:
        raise ValueError(f"the {name} set has no tokens; expected at least one batch with a token that is no padding")
    reached = {slice_name: own for slice_name, own in sums.items() if strict or own.num_tokens}
    slices = {slice_name: _finish(slice_name, own, num_tokens, name) for slice_name, own in reached.items()}
    if strict:
        _warn_of_few(slices, name)
    return Moments(slices, num_tokens)


@torch.no_grad()
def _read(
    model: nn.Module,
    batches: Iterable[Batch],
    blocks: Sequence[MoEBlock],
    by_layer: Mapping[int, list[int]],
    *,
    routers: bool,
    bar: tqdm,
) -> tuple[dict[SliceName, _Sums], int]:
    """Sums over the tokens of all batches, and the number of these tokens."""
    sums: dict[SliceName, _Sums] = {}
    num_tokens = 0
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    with evaluation_mode(model), ExitStack() as stack:
        enter = stack.enter_context
        experts = {b.layer_idx: enter(record_expert_inputs(model, b, by_layer[b.layer_idx])) for b in blocks}
        inputs = {b.layer_idx: enter(record_router_input(b)) for b in blocks if routers}
        run = enter(run_until_routed(model, blocks[-1].layer_idx))
        masks: dict[int, Tensor] = {}

        def passes() -> Iterator[Pass[None]]:
            for position, batch in enumerate(batches):
                masks[position] = batch["attention_mask"].to(device)
                yield partial(run, input_ids=batch["input_ids"].to(device), attention_mask=masks[position])

        def read(position: int, layer_idx: int) -> None:
            of_layer = {layer_idx: experts[layer_idx]}
            for slice_name, weighted in _weighted_inputs(of_layer, inputs, by_layer, masks[position].flatten().bool()):
                if slice_name not in sums:
                    sums[slice_name] = _Sums(weighted.shape[1], weighted.device)
                sums[slice_name].add(weighted)

        layer_indices = [block.layer_idx for block in blocks]
        for position, _ in enumerate(run_passes(model, passes(), layer_indices=layer_indices, read=read)):
            num_read = int(masks.pop(position).sum())
            num_tokens += num_read
            bar.update(num_read)
    return sums, num_tokens


def _weighted_inputs(
    experts: Mapping[int, Callable[[int], ExpertInputs]],
    routers: Mapping[int, Callable[[], Tensor]],
    by_layer: Mapping[int, list[int]],
    counted: Tensor,
) -> Iterator[tuple[SliceName, Tensor]]:
    """What each slice was multiplied with in the latest pass, weighted, padding left out. Shape `(N, d)` each."""
    for layer_idx, recorded in experts.items():
        for expert_idx in by_layer[layer_idx]:
            found = recorded(expert_idx)
            real = counted.to(found.token.device)[found.token]
            for projection, inputs in found.by_projection.items():
                weight = found.weight[real, None].to(inputs.dtype)
                yield SliceName(layer_idx, expert_idx, projection), inputs[real] * weight
        if layer_idx in routers:
            inputs = routers[layer_idx]()
            yield SliceName(layer_idx, None, ROUTER), inputs[counted.to(inputs.device)]


def _finish(slice_name: SliceName, sums: _Sums, num_read: int, name: str) -> SliceMoments:
    if sums.num_tokens == 0:
        raise ValueError(
            f"none of the {num_read} tokens of the {name} set reaches expert {slice_name.expert_idx} of layer "
            f"{slice_name.layer_idx}, so that nothing is known of its inputs; pass more rows, or other ones"
        )
    if not (sums.first.isfinite().all() and sums.second.isfinite().all()):
        raise ValueError(
            f"inputs of {slice_name} on the {name} set are NaN or infinite; check the checkpoint and dtype"
        )
    mean, second = sums.first / sums.num_tokens, sums.second / sums.num_tokens
    return SliceMoments(mean.float().cpu(), second.float().cpu(), sums.num_tokens)


def _warn_of_few(slices: Mapping[SliceName, SliceMoments], name: str) -> None:
    few = [f"{n} ({own.num_tokens} of {own.dimension})" for n, own in slices.items() if own.num_tokens < own.dimension]
    if few:
        warnings.warn(
            f"fewer tokens of the {name} set reach a slice than it has dimensions: {'; '.join(few)}. Directions that "
            "none of them takes count as free; pass more rows",
            stacklevel=3,
        )
