"""Run only a part of a model's decoder layers: up to layer l, from layer l on, or without those above it.

What enters layer l depends on the layers below it alone. Where these do not change, it is computed once
(`run_until_layer`) and put back in as often as needed (`run_from_layer`): the same logits for the cost of the layers
from l on.

Nothing here knows a family. The layers below l are replaced by modules that compute nothing, return what the last of
them returned before, and are otherwise the layers that they stand for: models that look up an attention type, a mask
or a cache for each layer find what they look for. Whether that is enough for a model is measured, see `is_exact`;
docs/segments.md lists the families.

Letters: B batch, S sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.blocks import find_moe_blocks
from uoe_peft.moe.interventions import find_decoder
from uoe_peft.moe.lm_head import no_logits

LayerState = Tensor | tuple[Any, ...]
"""What a decoder layer returns: hidden states of shape `(B, S, H)` (some families: `(B, S, ·, H)`), or a tuple that
begins with them."""


# Where a model has its layers. Looking for it costs a millisecond for every few layers, and steps ask again and again.
_layers_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _Reached(Exception):
    """Ends a forward pass where it has computed what was asked for; never seen outside `_output_of`."""


class _StandIn(nn.Module):
    """Computes nothing and returns a given state; everything else is as in the layer that it stands for."""

    def __init__(self, layer: nn.Module, state: Sequence[LayerState]) -> None:
        super().__init__()
        # In a tuple, so that the layer is not registered: its parameters have their place in the model already.
        self._stands_for = (layer,)
        self._state = state  # its first item, when it is asked for

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> LayerState:
        return self._state[0]


def find_layers(model: nn.Module) -> nn.Module:
    """The module that holds a model's decoder layers, each under its index; functions of this module take it.

    Raises:
        UnsupportedModelError: The model has no routed experts, or they are not in a stack of layers.
    """
    name = _layers_names.get(model)
    if name is None:
        block = find_moe_blocks(model)[0]
        parts = block.experts_name.split(".")
        name = _layers_names[model] = ".".join(parts[: parts.index(str(block.layer_idx))])
    return model.get_submodule(name)


def run_until_layer(model: nn.Module, layer_idx: int, inputs: Mapping[str, Any]) -> LayerState:
    """What enters a decoder layer, without running that layer, those above it, or the LM head.

    Args:
        model: Any model with routed experts, wrapped by PEFT or not.
        layer_idx: Decoder layer, 1 or higher.
        inputs: The model's keyword inputs.

    Returns:
        The output of the layer below, detached from the graph.

    Raises:
        UnsupportedModelError: The model has no routed experts, or its forward pass does not run the layer.
        ValueError: There is no such layer, or no layer below it.
    """
    below = _below(find_layers(model), layer_idx)[-1]
    state = _output_of(below, model, inputs)
    if state is None:
        raise UnsupportedModelError(
            f"the forward pass of {type(model).__name__} never called layer {layer_idx - 1}, a {type(below).__name__}"
        )
    return state


@contextmanager
def record_layer_input(layers: nn.Module, layer_idx: int) -> Iterator[list[LayerState]]:
    """A list that receives what enters a decoder layer, of the latest forward pass inside the context.

    Args:
        layers: The model's decoder layers, as `find_layers` gives them.
        layer_idx: Decoder layer, 1 or higher.

    Raises:
        ValueError: There is no such layer, or no layer below it.
    """
    recorded: list[LayerState] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], output: LayerState) -> None:
        recorded[:] = [_detach(output)]

    handle = _below(layers, layer_idx)[-1].register_forward_hook(keep)
    try:
        yield recorded
    finally:
        handle.remove()


@contextmanager
def run_from_layer(layers: nn.Module, layer_idx: int, state: LayerState) -> Iterator[None]:
    """Inside the context forward passes skip the layers below a decoder layer, which gets `state` instead.

    Call the model with the inputs that the state was computed from: masks, positions and whatever else it derives from
    them is computed as ever. Layers that are skipped are not called, so that hooks on them see nothing and outputs
    such as `hidden_states` lack theirs. Gradient checkpointing may recompute after the context has ended.

    Args:
        layers: The model's decoder layers, as `find_layers` gives them.
        layer_idx: Decoder layer, 1 or higher.
        state: As `run_until_layer` gives it.

    Raises:
        ValueError: There is no such layer, or no layer below it.
    """
    with _stand_ins(layers, dict(enumerate(_below(layers, layer_idx))), [state]):
        yield


@contextmanager
def stop_after_layer(model: nn.Module, layer_idx: int) -> Iterator[None]:
    """Inside the context forward passes compute nothing above a decoder layer, and no logits.

    What the layer returns is read with a hook. The model's own output means nothing, but its graph reaches what the
    layer depends on, as launchers of several processes expect. Call the model as ever, `use_cache=False`.

    Args:
        model: Any causal language model with routed experts, wrapped by PEFT or not.
        layer_idx: Decoder layer, the last that is run.

    Raises:
        UnsupportedModelError: The model has no routed experts, or no LM head.
        ValueError: There is no such layer.
    """
    layers = find_layers(model)
    children = {int(name): layer for name, layer in layers.named_children()}
    if layer_idx not in children:
        raise ValueError(f"the model has {len(children)} decoder layers, got layer_idx={layer_idx}")
    returned: list[LayerState] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], output: LayerState) -> None:
        returned[:] = [output]

    above = {index: layer for index, layer in children.items() if index > layer_idx}
    handle = children[layer_idx].register_forward_hook(keep)
    try:
        with _stand_ins(layers, above, returned), no_logits(model):
            yield
    finally:
        handle.remove()


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


@contextmanager
def _stand_ins(layers: nn.Module, replaced: Mapping[int, nn.Module], state: Sequence[LayerState]) -> Iterator[None]:
    modules = layers._modules
    try:
        for index, layer in replaced.items():
            modules[str(index)] = _StandIn(layer, state)
        yield
    finally:
        for index, layer in replaced.items():
            modules[str(index)] = layer


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
        whole = _output_of(decoder, model, inputs)
    if not recorded or whole is None:
        return torch.inf
    state = recorded[0] if keep_padding else _refill_padding(recorded[0], inputs)
    try:
        with run_from_layer(layers, layer_idx, state):
            part = _output_of(decoder, model, inputs)
    # What a family does with layers that say nothing new cannot be known: any failure means that it needs them.
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
        return torch.inf
    assert part is not None
    expected, found = _real_tokens(whole, inputs), _real_tokens(part, inputs)
    difference = (found - expected).square().mean().sqrt() / expected.std()
    return torch.inf if difference.isnan() else difference.item()


def tolerance(model: nn.Module) -> float:
    """Largest relative difference that counts as rounding, in the dtype that the model or autocast computes in."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
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


def _below(layers: nn.Module, layer_idx: int) -> list[nn.Module]:
    """The decoder layers below a layer, at least one."""
    children = dict(layers.named_children())
    if not 1 <= layer_idx < len(children):
        raise ValueError(
            f"the model has {len(children)} decoder layers, got layer_idx={layer_idx}; use 1 to {len(children) - 1}: "
            "below layer 0 there is nothing to leave out"
        )
    return [children[str(index)] for index in range(layer_idx)]


def _detach(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(_detach(part) for part in output)
    return output


def _refill_padding(state: LayerState, inputs: Mapping[str, Any]) -> LayerState:
    mask = inputs.get("attention_mask")
    if mask is None:
        return state
    if isinstance(state, Tensor):
        return fill_padding(state, mask)
    return (fill_padding(state[0], mask), *state[1:])


def _output_of(module: nn.Module, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a module of the model returns, or None if it is not called; the forward pass ends there."""
    reached: list[Any] = []

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reached.append(_detach(output))
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        model(**{**inputs, "use_cache": False})
    except _Reached:
        return reached[0]
    finally:
        handle.remove()
    return None


def _real_tokens(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    hidden = _hidden_states(output)
    mask = inputs.get("attention_mask")
    return (hidden if mask is None else hidden[mask.to(hidden.device).bool()]).float()


def _hidden_states(output: Any) -> Tensor:
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])
