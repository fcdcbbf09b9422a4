"""The LM head apart from the decoder below it: left out of a forward pass, or applied to chosen hidden states.

The vocabulary is often a model's largest dimension: a step that needs no logits should compute none, and one that
needs many should not hold them all at once.

Letters: B batch, S sequence, N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.interventions import find_decoder

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@contextmanager
def no_logits(model: nn.Module) -> Iterator[None]:
    """Inside the context the LM head gets no tokens: logits are of shape `(B, 0, V)` and cost nothing.

    Raises:
        UnsupportedModelError: The model has no LM head.
    """

    def leave_out(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][..., :0, :], *args[1:])

    handle = find_lm_head(model).register_forward_pre_hook(leave_out)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def record_decoder_output(model: nn.Module) -> Iterator[list[Any]]:
    """A list that receives what the decoder hands to the LM head's side, of the latest forward pass in the context.

    Raises:
        UnsupportedModelError: The model is a decoder without an LM head.
    """
    recorded: list[Any] = []

    def keep(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorded[:] = [output]

    handle = _decoder_below_head(model).register_forward_hook(keep)
    try:
        yield recorded
    finally:
        handle.remove()


def apply_lm_head(model: nn.Module, decoder_output: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with all that the model itself does to them after the decoder (scales, soft caps).

    The model's own forward pass is run with a decoder that computes nothing and says what is given here.

    Args:
        model: Any causal language model, wrapped by PEFT or not.
        decoder_output: As `record_decoder_output` gives it.
        hidden: In place of its `last_hidden_state`. Shape `(N, H)`.

    Returns:
        Shape `(N, V)`.

    Raises:
        UnsupportedModelError: The model is a decoder without an LM head.
    """
    decoder = _decoder_below_head(model)
    output = copy(decoder_output)
    output.last_hidden_state = hidden[None]
    # Set on the instance, where accelerate may have put a forward of its own; hooks and module tree stay as they are.
    own = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: output
    try:
        ids = torch.zeros((1, len(hidden)), dtype=torch.long, device=hidden.device)
        return cast(Tensor, model(input_ids=ids, use_cache=False).logits[0])
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


def find_lm_head(model: nn.Module) -> nn.Module:
    """The module that makes logits.

    Raises:
        UnsupportedModelError: The model has none.
    """
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} has no LM head; use a causal language model")
    return head


def _decoder_below_head(model: nn.Module) -> nn.Module:
    decoder = find_decoder(model)
    if decoder is (cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model):
        raise UnsupportedModelError(f"{type(decoder).__name__} has no decoder apart from an LM head")
    return decoder


def independent_copy(model: ModuleT) -> ModuleT:
    """A deep copy of a model that runs on its own weights, also after a trainer of TRL has had the model.

    Such a trainer gives a model a second LM head: its `forward` becomes a closure over the old one. A plain deep copy
    goes on calling that closure, and with it the weights of the model that it was made from.
    """
    memo: dict[int, Any] = {}
    copied = deepcopy(model, memo)
    for module in copied.modules():
        forward = getattr(vars(module).get("forward"), "__func__", None)
        cells = getattr(forward, "__closure__", None) or ()
        names = forward.__code__.co_freevars if cells and forward is not None else ()
        closure = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
        if "original_forward" in closure:
            module.forward = deepcopy(closure["original_forward"], memo)  # bound to the copy
    return copied
