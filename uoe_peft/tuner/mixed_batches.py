"""Batches in which every sample has an adapter of its own: PEFT's `adapter_names`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What a model's batch is read from, in this order.
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class AppliedGroup:
    """Adapters whose deltas are added together, and the samples of the batch that they apply to (None: all)."""

    adapters: list[str]
    samples: list[bool] | None

    def mask(self, num_rows: int, device: torch.device) -> Tensor:
        """Whether each of `num_rows` rows, the same number for each sample in turn, belongs to such a sample."""
        samples = torch.tensor(self.samples, device=device)
        if num_rows % len(samples):
            raise ValueError(f"adapter_names has {len(samples)} entries, which does not divide {num_rows} tokens")
        return samples.repeat_interleave(num_rows // len(samples))


@contextmanager
def handed_out(
    adapter_names: Sequence[str], model: nn.Module, layers: Sequence[nn.Module], *, num_copies: int
) -> Iterator[None]:
    """Inside the context, forward passes of this thread give each layer the adapter of every sample.

    Args:
        adapter_names: The adapter of each sample.
        model: The model whose batch is compared with them.
        layers: The layers that take `adapter_names`.
        num_copies: How many rows in a row generation makes of one sample, as for beams.

    Raises:
        ValueError: In the forward pass, that its batch has another number of samples.
    """
    thread, names = threading.get_ident(), list(adapter_names)

    def check(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        num_rows = _num_rows(args, kwargs)
        if threading.get_ident() == thread and num_rows not in (None, len(names), len(names) * num_copies):
            raise ValueError(
                f"adapter_names has {len(names)} entries for a batch of {num_rows} samples; pass one name for each "
                'sample, "__base__" for none'
            )

    def hand_out(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Hooks are the model's, but these names are of one thread's batch.
        return (args, {**kwargs, "adapter_names": names}) if threading.get_ident() == thread else None

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(check, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(hand_out, with_kwargs=True).remove)
        yield


def copies_per_sample(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How many rows in a row `model.generate(**kwargs)` makes of one sample."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def setting(name: str) -> int:
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), 1)

    return setting("num_beams") if setting("num_beams") > 1 else setting("num_return_sequences")


def _num_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Number of samples in a call of the model; None where it cannot be told."""
    given = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)]
    tensors = given or [arg for arg in args if isinstance(arg, Tensor)]
    return len(tensors[0]) if tensors else None
