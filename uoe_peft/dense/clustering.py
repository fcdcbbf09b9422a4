"""Calibration text -> what each neuron does on it -> groups of neurons that are active on the same texts.

Letters: N sequences of calibration text, I neurons of a layer, E groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from uoe_peft.data import Batch, collate, tokenize_dataset
from uoe_peft.data.tokenization import ProcessingClass, materialise, text_tokenizer
from uoe_peft.dense.balanced import balanced_clusters
from uoe_peft.dense.groups import NeuronGroups, check_divides
from uoe_peft.dense.layers import find_dense_layers, num_neurons
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.interventions import find_decoder


def cluster_neurons(
    model: nn.Module,
    dataset: Dataset | IterableDataset,
    *,
    processing_class: ProcessingClass,
    num_groups: int = 8,
    max_tokens: int = 100_000,
    batch_size: int = 8,
    max_length: int | None = 512,
    seed: int = 0,
    show_progress: bool = True,
) -> NeuronGroups:
    """Groups of equal size of the neurons of every feed-forward layer, at the cost of one pass over calibration text.

    A neuron is described by its effect on each sequence, `|act(gate) * up| * norm(what it writes)`, averaged over the
    sequence's tokens, relative to its mean over the sequences. Neurons whose descriptions point into the same direction
    come into one group: they rise and fall with the same texts. Text that holds both what is to be forgotten and what
    is to be kept tells them apart best.

    Args:
        model: A dense causal language model.
        dataset: Calibration text, in the types that `tokenize_dataset` names; its rows are drawn in random order.
        processing_class: Tokenizer, or a processor that holds one.
        num_groups: E, at least 2; it must divide the number of neurons.
        max_tokens: Where reading stops; at least two sequences are read.
        batch_size: Sequences in a batch.
        max_length: Longest sequence in tokens; None for no limit.
        seed: Of the order of the rows and of the first centres.
        show_progress: Whether to show a progress bar.

    Raises:
        UnsupportedModelError: The model cannot be factorized, see `factorize`.
        ValueError: The neurons cannot be divided into so many groups, the set is empty or has one sequence, a number is
            out of range, or an activation is NaN or infinite.
    """
    for option, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    for layer_idx, size in num_neurons(model).items():
        check_divides(num_groups, size, layer_idx=layer_idx)
    tokenized = tokenize_dataset(
        materialise(dataset, name="calibration").shuffle(seed=seed),
        processing_class,
        max_length=max_length,
        name="calibration",
    )
    batches = _batches(tokenized, processing_class, max_tokens=max_tokens, batch_size=batch_size)
    effects = measure_effects(model, batches, show_progress=show_progress)
    generator = torch.Generator().manual_seed(seed)
    return NeuronGroups(
        {i: balanced_clusters(_directions(own), num_groups, generator=generator) for i, own in effects.items()},
        num_groups,
    )


def measure_effects(model: nn.Module, batches: list[Batch], *, show_progress: bool = False) -> dict[int, Tensor]:
    """Effect of each neuron on each sequence, averaged over the sequence's tokens, by layer. Shape `(I, N)`, float32.

    Args:
        model: A dense causal language model.
        batches: With `input_ids` and `attention_mask`; padding never counts.
        show_progress: Whether to show a progress bar.

    Raises:
        UnsupportedModelError: The model cannot be factorized.
        ValueError: An effect is NaN or infinite.
    """
    paths = find_dense_layers(model)
    parts: dict[int, list[Tensor]] = {layer_idx: [] for layer_idx in paths}
    decoder: Any = find_decoder(model)
    device = next(model.parameters()).device
    with evaluation_mode(model), ExitStack() as stack, tqdm(unit="tok", disable=not show_progress) as bar:
        inputs = {i: _recorded(model.get_submodule(f"{path}.down_proj")) for i, path in paths.items()}
        seen = {i: stack.enter_context(recorded) for i, recorded in inputs.items()}
        for batch in batches:
            mask = batch["attention_mask"].to(device)
            decoder(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
            for layer_idx, activations in seen.items():
                parts[layer_idx].append(_sequence_means(activations[0], mask))
            bar.update(int(mask.sum()))
    effects = {i: torch.cat(means).T * _norms(model, paths[i]) for i, means in parts.items()}
    for layer_idx, own in effects.items():
        if not own.isfinite().all():
            raise ValueError(
                f"activations of layer {layer_idx} are NaN or infinite, expected finite ones; check the checkpoint and "
                "the dtype (float16 overflows where bfloat16 does not)"
            )
    return effects


@contextmanager
def _recorded(down_proj: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds what entered a down projection in the latest pass: the activations of all neurons."""
    latest: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        latest[:] = args

    handle = down_proj.register_forward_pre_hook(keep)
    try:
        yield latest
    finally:
        handle.remove()


def _sequence_means(activations: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute activation over the tokens of each sequence: `(B, S, I)` to `(B, I)`, on the CPU."""
    mask = mask.to(activations.device).bool()
    # Not a product: padding may hold NaN.
    counted = torch.where(mask.unsqueeze(-1), activations.float().abs(), 0)
    return (counted.sum(dim=1) / mask.sum(dim=1, keepdim=True)).cpu()


def _norms(model: nn.Module, path: str) -> Tensor:
    """Norm of what each neuron writes. Shape `(I, 1)`."""
    weight = cast(Tensor, model.get_submodule(f"{path}.down_proj").weight)  # (H, I)
    return weight.detach().float().norm(dim=0).cpu().unsqueeze(1)


def _directions(effects: Tensor) -> Tensor:
    """Effects relative to each neuron's own mean, as unit vectors: `(I, N)` to `(I, N)`."""
    means = effects.mean(dim=1, keepdim=True)
    relative = effects / means.clamp(min=torch.finfo(effects.dtype).tiny) - 1
    return nn.functional.normalize(relative, dim=1)


def _batches(tokenized: Dataset, processing_class: ProcessingClass, *, max_tokens: int, batch_size: int) -> list[Batch]:
    examples: list[dict[str, list[int]]] = []
    num_tokens = 0
    for row in tokenized:
        num_tokens += len(row["input_ids"])
        if num_tokens > max_tokens and len(examples) >= 2:
            break
        examples.append(row)
    if len(examples) < 2:
        raise ValueError(
            f"the calibration set has {len(examples)} sequences; neurons are told apart by what they do on several"
        )
    examples.sort(key=lambda example: -len(example["input_ids"]))
    tokenizer = text_tokenizer(processing_class)
    padding = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(token, int))
    pad_token_id = next(padding)
    return [
        collate(examples[start : start + batch_size], pad_token_id=pad_token_id)
        for start in range(0, len(examples), batch_size)
    ]
