"""Whether a model that runs only a part of its layers says what the whole model says: measured, never assumed.

Letters: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from uoe_peft.moe.interventions import find_decoder
from uoe_peft.moe.lm_head import no_logits
from uoe_peft.moe.segments import (
    LayerState,
    find_layers,
    output_of,
    record_layer_input,
    run_from_layer,
    stop_after_layer,
)


@torch.no_grad()
def is_exact(model: nn.Module, inputs: Mapping[str, Any], layer_idx: int) -> bool:
    """Whether a model that starts at a layer says what the whole model says, to the rounding of its dtype.

    Arguments and errors as in `relative_difference`.
    """
    return relative_difference(model, inputs, layer_idx) <= tolerance(model)


@torch.no_grad()
def relative_difference(
    model: nn.Module, inputs: Mapping[str, Any], layer_idx: int, *, keep_padding: bool = False
) -> float:
    """How far a model that starts at a layer is from the whole model, at real tokens.

    Args:
        model: Any model with routed experts.
        inputs: The model's keyword inputs, among them `input_ids`, and `attention_mask` where there is padding.
        layer_idx: Decoder layer, 1 or higher.
        keep_padding: Put the state in as it was. Otherwise with other values at padding, as a cache that keeps none
            has it: experts then multiply matrices of other heights, which may round the last bit differently.

    Returns:
        Of what the LM head gets, the root mean square of the difference over the standard deviation: 0 where every bit
        is the same, about 1 where nothing is, infinity where the model cannot start there at all.

    Raises:
        UnsupportedModelError: The model has no routed experts.
        ValueError: There is no such layer, or no layer below it.
    """
    layers, decoder = find_layers(model), find_decoder(model)
    with record_layer_input(layers, layer_idx) as recorded:
        whole = output_of(decoder, model, inputs)
    if not recorded or whole is None:
        return torch.inf
    state = recorded[0] if keep_padding else _refill_padding(recorded[0], inputs)
    try:
        with run_from_layer(layers, layer_idx, state):
            part = output_of(decoder, model, inputs)
    # What a family does with layers that say nothing new cannot be known: any failure means that it needs them.
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return torch.inf
    assert part is not None
    expected, found = _real_tokens(whole, inputs), _real_tokens(part, inputs)
    difference = (found - expected).square().mean().sqrt() / expected.std()
    return torch.inf if difference.isnan() else difference.item()


def tolerance(model: nn.Module) -> float:
    """Largest relative difference that counts as rounding, in the dtype that the model or autocast computes in."""
    parameter = next(p for p in model.parameters() if p.is_floating_point() and not p.is_meta)
    device = parameter.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else parameter.dtype
    return max(4 * torch.finfo(dtype).eps, 1e-5)


def fill_padding(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states whose padding holds the row's last real one: any finite value would do, and it is one.

    Args:
        hidden: Shape `(B, S, ...)`.
        attention_mask: 1 for tokens, 0 for padding; each row has a token. Shape `(B, S)`.
    """
    positions = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    mask = attention_mask.to(hidden.device).bool()
    last = torch.where(mask, positions, 0).amax(dim=1, keepdim=True)
    source = torch.where(mask, positions, last)
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], source]


@torch.no_grad()
def stops_exactly(model: nn.Module, inputs: Mapping[str, Any], layer_idx: int) -> bool:
    """Whether a layer's output is the same, bit for bit, where nothing above it is run.

    Arguments as in `stop_after_layer`; `inputs` are the model's keyword inputs.
    """
    layer, outputs = find_layers(model).get_submodule(str(layer_idx)), []
    handle = layer.register_forward_hook(lambda layer, args, output: outputs.append(_hidden_states(output)))
    try:
        with no_logits(model):
            model(**{**inputs, "use_cache": False})
        with stop_after_layer(model, layer_idx):
            model(**{**inputs, "use_cache": False})
    # As in `relative_difference`: what a family misses cannot be known.
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return False
    finally:
        handle.remove()
    return len(outputs) == 2 and torch.equal(_real_tokens(outputs[0], inputs), _real_tokens(outputs[1], inputs))


def _refill_padding(state: LayerState, inputs: Mapping[str, Any]) -> LayerState:
    mask = inputs.get("attention_mask")
    if mask is None:
        return state
    if isinstance(state, Tensor):
        return fill_padding(state, mask)
    return (fill_padding(state[0], mask), *state[1:])


def _real_tokens(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    hidden = _hidden_states(output)
    mask = inputs.get("attention_mask")
    return (hidden if mask is None else hidden[mask.to(hidden.device).bool()]).float()


def _hidden_states(output: Any) -> Tensor:
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])
