"""Many forward passes of a model, batch by batch; or layer by layer, where the model does not fit into memory.

A model that is streamed from disk must not be read once for each batch. Whoever has many passes to run says here what
they are; a streamed model then takes all of them through one layer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor, nn

T = TypeVar("T")

Pass = Callable[[], T]
"""A function without arguments that runs one forward pass of the model, and may read what it says."""

Read = Callable[[int, int], Tensor | None]
"""`read(position, layer_idx)`: what is to be kept of a layer, once the pass at a position has run it; None: nothing."""


@runtime_checkable
class RunsLayerByLayer(Protocol):
    """A model that takes many passes through a layer before it goes on to the next one."""

    def run_layer_by_layer(
        self, passes: Sequence[Pass[T]], *, layer_indices: Sequence[int], read: Read
    ) -> Iterator[tuple[T, list[Tensor | None]]]:
        """See :func:`run_passes`."""
        ...

    def keep_layers(self, layer_indices: Iterable[int]) -> None:
        """Have decoder layers in memory from now on."""
        ...

    def check_layers(self, layer_indices: Iterable[int]) -> None:
        """Raise `ValueError` where decoder layers could not be kept: there are none such, or memory is short."""
        ...


def find_streamed(model: nn.Module) -> RunsLayerByLayer | None:
    """The part of a model that runs layer by layer, the model itself or what PEFT wraps; None where all is resident."""
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return base if isinstance(base, RunsLayerByLayer) else None


def keep_layers(model: nn.Module, layer_indices: Iterable[int]) -> None:
    """Have decoder layers of a streamed model in memory from now on; a resident model has them already."""
    streamed = find_streamed(model)
    if streamed is not None:
        streamed.keep_layers(layer_indices)


def check_layers(model: nn.Module, layer_indices: Iterable[int]) -> None:
    """Say now, before hours of passes, that a streamed model could not keep decoder layers in memory."""
    streamed = find_streamed(model)
    if streamed is not None:
        streamed.check_layers(layer_indices)


def run_passes(
    model: nn.Module, passes: Iterable[Pass[T]], *, layer_indices: Sequence[int] = (), read: Read | None = None
) -> Iterator[tuple[T, list[Tensor | None]]]:
    """The results of many passes, and what was read of layers while they ran.

    Args:
        model: The model that the passes run, wrapped by PEFT or not.
        passes: In evaluation mode, without gradient below what they return; each may end early. On a streamed model
            each is called once for every layer, and ended by an exception where that layer has run: they must have no
            effect but what they return.
        layer_indices: Decoder layers to read, rising.
        read: What to read of them. Hooks that it looks into hold what its pass and layer have just done. If it returns
            nothing, a streamed run that is stopped begins anew.

    Yields:
        For each pass, in order, its result and what was read of each of the layers.
    """
    look: Read = read if read is not None else _nothing
    streamed = find_streamed(model)
    if streamed is not None:
        yield from streamed.run_layer_by_layer(list(passes), layer_indices=layer_indices, read=look)
        return
    for position, run in enumerate(passes):
        result = run()
        yield result, [look(position, layer_idx) for layer_idx in layer_indices]


def _nothing(position: int, layer_idx: int) -> None:
    return None
