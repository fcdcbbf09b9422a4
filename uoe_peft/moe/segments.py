"""Run only a part of a model's decoder layers: up to layer l, from layer l on, or without those above it.

What enters layer l depends on the layers below it alone. Where these do not change, it is computed once
(`run_until_layer`) and put back in as often as needed (`run_from_layer`): the same logits for the cost of the layers
from l on.

Nothing here knows a family. The layers below l are replaced by modules that compute nothing, return what the last of
them returned before, and are otherwise the layers that they stand for: models that look up an attention type, a mask
or a cache for each layer find what they look for. Whether that is enough for a model is measured by
:mod:`uoe_peft.moe.exactness`; docs/segments.md lists the families.

Letters: B batch, S sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from uoe_peft.errors import NoExpertsError, UnsupportedModelError
from uoe_peft.moe.blocks import find_moe_blocks
from uoe_peft.moe.interventions import find_decoder
from uoe_peft.moe.lm_head import no_logits

LayerState = Tensor | tuple[Any, ...]
"""What a decoder layer returns: hidden states of shape `(B, S, H)` (some families: `(B, S, ·, H)`), or a tuple that
begins with them."""


# Where a model has its layers. Looking for it costs a millisecond for every few layers, and steps ask again and again.
_layers_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _Reached(Exception):
    """Ends a forward pass where it has computed what was asked for; never seen outside `output_of`."""


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
        UnsupportedModelError: The model has no routed experts, and its decoder no list called `layers` or an encoder
            beside it; or its experts are none that this package reads.
    """
    name = _layers_names.get(model)
    if name is None:
        name = _layers_names[model] = _layers_name(model)
    return model.get_submodule(name)


def _layers_name(model: nn.Module) -> str:
    try:
        block = find_moe_blocks(model)[0]
    except NoExpertsError as error:
        # A dense model, which rivals are trained on. A list alone says that the children are layers, in their order.
        layers = getattr(find_decoder(model), "layers", None)
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        if encodes or not isinstance(layers, nn.ModuleList):
            raise UnsupportedModelError(
                f"{type(model).__name__} has neither routed experts nor a decoder with a list `layers`, or it has an "
                "encoder beside: choose losses that read no layer's output, and prefix_cache=False"
            ) from error
        return next(name for name, module in model.named_modules() if module is layers)
    parts = block.experts_name.split(".")
    return ".".join(parts[: parts.index(str(block.layer_idx))])


def run_until_layer(model: nn.Module, layer_idx: int, inputs: Mapping[str, Any]) -> LayerState:
    """What enters a decoder layer, without running that layer, those above it, or the LM head.

    Args:
        model: Any model that `find_layers` takes, wrapped by PEFT or not.
        layer_idx: Decoder layer, 1 or higher.
        inputs: The model's keyword inputs.

    Returns:
        The output of the layer below, detached from the graph.

    Raises:
        UnsupportedModelError: The model's layers are not found, or its forward pass does not run the layer.
        ValueError: There is no such layer, or no layer below it.
    """
    below = _below(find_layers(model), layer_idx)[-1]
    state = output_of(below, model, inputs)
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
        recorded[:] = [detached(output)]

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
        model: Any causal language model that `find_layers` takes, wrapped by PEFT or not.
        layer_idx: Decoder layer, the last that is run.

    Raises:
        UnsupportedModelError: The model's layers are not found, or it has no LM head.
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


def _below(layers: nn.Module, layer_idx: int) -> list[nn.Module]:
    """The decoder layers below a layer, at least one."""
    children = dict(layers.named_children())
    if not 1 <= layer_idx < len(children):
        raise ValueError(
            f"the model has {len(children)} decoder layers, got layer_idx={layer_idx}; use 1 to {len(children) - 1}: "
            "below layer 0 there is nothing to leave out"
        )
    return [children[str(index)] for index in range(layer_idx)]


def detached(output: Any) -> Any:
    """What a layer returns, without its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(detached(part) for part in output)
    return output


def output_of(module: nn.Module, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a module of the model returns, or None if it is not called; the forward pass ends there."""
    reached: list[Any] = []

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        reached.append(detached(output))
        raise _Reached

    handle = module.register_forward_hook(stop)
    try:
        model(**{**inputs, "use_cache": False})
    except _Reached:
        return reached[0]
    finally:
        handle.remove()
    return None
