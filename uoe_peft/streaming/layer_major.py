"""Take many passes through one decoder layer after the other."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.interventions import find_decoder
from uoe_peft.moe.passes import Pass, Read
from uoe_peft.moe.segments import LayerState, detached, find_layers, run_from_layer
from uoe_peft.streaming.loading import Stop
from uoe_peft.streaming.memory import interrupted_bytes
from uoe_peft.streaming.on_disk import ExpertsOnDisk, Interrupted
from uoe_peft.streaming.residence import Residence
from uoe_peft.streaming.states import Entered, States, num_bytes

T = TypeVar("T")


class LayerSweeps(Generic[T]):
    """Many passes that go through a layer, all of them, before the next layer is read.

    A pass is called once for every layer: those below are stand-ins that hand on what entered it, and where the next
    one would begin the pass is ended. So positions, masks and whatever else a layer gets come from the model's own code
    each time, and a pass that ends by itself does so where it always does.

    Args:
        model: The streamed model.
        residence: Brings its layers in.
        passes: As in :func:`uoe_peft.moe.passes.run_passes`, like the next two.
        layer_indices: Layers to read.
        read: What to read of them.
        embedded: Where to keep what the token embedding gives.
        on_disk: Experts that layers come in without.
        together: Bytes that such experts' outputs may take, for all passes that go through them together.
        edited: The lowest layer that an adapter edits.
        entered: Keeps what enters that layer, for the same passes another time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        residence: Residence,
        passes: Sequence[Pass[T]],
        *,
        layer_indices: Sequence[int],
        read: Read,
        embedded: States,
        on_disk: Mapping[int, ExpertsOnDisk],
        together: int,
        edited: int | None,
        entered: Entered,
    ) -> None:
        self._model, self._residence, self._passes = model, residence, passes
        self._on_disk, self._together = on_disk, together
        self._edited, self._entered = edited, entered
        self._layer_indices, self._read = layer_indices, read
        self._layers = [find_layers(model).get_submodule(name) for name in find_layers(model)._modules]
        # What the token embedding gives, as often as the model's own forward pass asks: some families use it in every
        # layer.
        self._embedded = embedded
        self._sizes: list[tuple[int, int]] = []  # tokens and bytes of each pass
        self._results: dict[int, T] = {}
        self._readings: dict[int, dict[int, Tensor | None]] = {}

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each pass, padding included; known once they were embedded."""
        return [tokens for tokens, _ in self._sizes]

    def embed(self) -> str:
        """Run the token embedding for all passes.

        Returns:
            A digest of their inputs.

        Raises:
            UnsupportedModelError: A pass does not go through the model's token embedding.
        """
        digest = hashlib.sha256(repr(tuple(self._layer_indices)).encode())

        def note_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _update(digest, [*args, *kwargs.items()])

        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._embedded.put(len(self._sizes), output.detach())
            self._sizes.append((output.shape[:2].numel(), num_bytes(output)))
            raise Stop

        embedding = self._model.get_input_embeddings()
        handles = [
            find_decoder(self._model).register_forward_pre_hook(note_inputs, with_kwargs=True),
            embedding.register_forward_hook(keep),
        ]
        try:
            for position, run in enumerate(self._passes):
                _until_stop(run)
                if len(self._sizes) <= position:
                    raise UnsupportedModelError(
                        f"a pass of {type(self._model).__name__} never called its {type(embedding).__name__}; pass "
                        "token ids"
                    )
        finally:
            for handle in handles:
                handle.remove()
        return digest.hexdigest()

    def run(self, states: States, *, key: str, show_progress: bool) -> Iterator[tuple[T, list[Tensor | None]]]:
        """Take all passes through the layers; results in order, as soon as they are there.

        Args:
            states: Of the passes.
            key: Names what is computed without an adapter.
            show_progress: Whether to show a bar.

        Raises:
            UnsupportedModelError: A pass ends before a layer that is to be read.
            ValueError: The disk has no room for the states.
        """
        finished, readings = states.finished()
        before = None if self._edited is None else self._entered.get(key)
        if before is not None and before[0] <= min([cast(int, self._edited), *self._layer_indices]):
            finished = before[0] - 1
            states.begin_from(before[1])
        self._readings = {index: dict(values) for index, values in readings.items()}
        states.check_room(sum(size for _, size in self._sizes))
        num_out = 0
        for layer_idx in self._bar(range(finished + 1, len(self._layers)), show=show_progress):
            # Above the last layer there is the head: both stay while all passes go through them.
            is_last = layer_idx == len(self._layers) - 1
            self._residence.drop_all()
            if layer_idx == self._edited and (entering := states.all_of(len(self._passes))) is not None:
                self._entered.put(key, layer_idx, entering)
            states.begin(layer_idx)
            with self._residence.holding() if is_last else nullcontext():
                for position, interrupted in self._so_far(layer_idx, range(num_out, len(self._passes)), states):
                    if position not in self._results:
                        self._through(layer_idx, position, states, interrupted)
                    if position == num_out and position in self._results:
                        yield self._results.pop(position), self._readings_of(position)
                        num_out += 1
            if num_out == len(self._passes):
                return
            kept = {index: _tensors(values) for index, values in self._readings.items()}
            # What was handed out already, or kept by the reader itself, would be missing in another process.
            is_all = not num_out and not self._results and len(self._readings) == sum(map(bool, kept.values()))
            states.finish(layer_idx, kept if is_all else None)

    def _so_far(
        self, layer_idx: int, positions: range, states: States
    ) -> Iterator[tuple[int, AbstractContextManager[None]]]:
        """Passes, and what they go on from inside a layer whose experts are on disk: these are read for many passes."""
        experts = self._on_disk.get(layer_idx)
        for group in [positions] if experts is None else self._groups(positions):
            noted: dict[int, Interrupted] = {}
            if experts is not None:
                for position in group:
                    if position not in self._results:
                        with experts.interrupting() as noted[position], self._at(layer_idx, position, states):
                            _until_stop(self._passes[position])
                experts.compute(list(noted.values()))
            for position in group:
                own = noted.pop(position, None)
                yield position, nullcontext() if experts is None or own is None else experts.going_on(own)

    def _groups(self, positions: range) -> Iterator[range]:
        """Passes whose experts' outputs fit into memory together."""
        start, size = positions.start, 0
        for position in positions:
            own = interrupted_bytes(self._model, self._sizes[position][1])
            if size and size + own > self._together:
                yield range(start, position)
                start, size = position, 0
            size += own
        yield range(start, positions.stop)

    def _through(
        self, layer_idx: int, position: int, states: States, interrupted: AbstractContextManager[None]
    ) -> None:
        """Take a pass through a layer, and read what is to be read of it."""
        layer = self._layers[layer_idx]
        returned: list[LayerState] = []

        def keep(layer: nn.Module, args: tuple[Any, ...], output: LayerState) -> None:
            returned[:] = [detached(output)]

        handle = layer.register_forward_hook(keep)
        try:
            with self._at(layer_idx, position, states), interrupted:
                ended, result = _until_stop(self._passes[position])
        finally:
            handle.remove()
        if not returned and not ended:
            raise UnsupportedModelError(f"the forward pass of {type(self._model).__name__} skips layer {layer_idx}")
        if layer_idx in self._layer_indices:
            self._readings.setdefault(layer_idx, {})[position] = self._read(position, layer_idx)
        if ended:
            self._results[position] = result
        else:
            states.put(position, returned[0])

    @contextmanager
    def _at(self, layer_idx: int, position: int, states: States) -> Iterator[None]:
        """Inside the context a pass goes through a layer alone."""
        with self._starting_at(layer_idx, position, states), self._residence.ending_before(layer_idx + 1):
            yield

    @contextmanager
    def _starting_at(self, layer_idx: int, position: int, states: States) -> Iterator[None]:
        """Inside the context the model begins at a layer, and its embedding need not be there."""
        embedded = self._embedded.get(position)
        embedding = self._model.get_input_embeddings()
        own = embedding.forward
        embedding.forward = lambda *args, **kwargs: embedded
        try:
            if layer_idx == 0:
                yield
            else:
                with run_from_layer(find_layers(self._model), layer_idx, states.get(position)):
                    yield
        finally:
            embedding.forward = own

    def _readings_of(self, position: int) -> list[Tensor | None]:
        unread = [index for index in self._layer_indices if position not in self._readings.get(index, {})]
        if unread:
            raise UnsupportedModelError(f"a pass ended before layer {unread[0]}, which was to be read")
        return [self._readings[index].pop(position) for index in self._layer_indices]

    def _bar(self, layer_indices: range, *, show: bool) -> Iterator[int]:
        """Layer indices, with a bar that says how fast tokens go through one."""
        num_tokens = sum(self.num_tokens)
        with tqdm(
            total=len(self._layers), initial=layer_indices.start, desc="Layers", unit="layer", disable=not show
        ) as bar:
            for layer_idx in layer_indices:
                start = time.perf_counter()
                yield layer_idx
                bar.set_postfix_str(f"{num_tokens / (time.perf_counter() - start):.0f} tok/s in a layer")
                bar.update()


def _until_stop(run: Pass[T]) -> tuple[bool, Any]:
    """Whether a pass ended by itself, and its result."""
    try:
        return True, run()
    except Stop:
        return False, None


def _tensors(readings: Mapping[int, Tensor | None]) -> dict[int, Tensor]:
    """What was read of a layer; empty where a part of it is nothing."""
    found = {position: value for position, value in readings.items() if value is not None}
    return found if len(found) == len(readings) else {}


def _update(digest: Any, values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping | tuple | list):
            _update(digest, [*value.items()] if isinstance(value, Mapping) else value)
        else:
            digest.update(repr(value).encode())
