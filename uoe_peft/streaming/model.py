"""A model whose decoder layers stay on disk and are read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.passes import Pass, Read
from uoe_peft.moe.segments import find_layers
from uoe_peft.streaming.checkpoint import Checkpoint
from uoe_peft.streaming.layer_major import LayerSweeps
from uoe_peft.streaming.loading import load_when_called, lowest_edited_layer, part_paths
from uoe_peft.streaming.memory import GIB, available_memory, interrupted_bytes, working_bytes
from uoe_peft.streaming.on_disk import ExpertsOnDisk, bytes_of_blocks, leave_on_disk
from uoe_peft.streaming.opening import make_skeleton, without_weights
from uoe_peft.streaming.quantisation import find_dequantizer, plain_headers, without_quantisation
from uoe_peft.streaming.reader import PartReader, no_loading_bar
from uoe_peft.streaming.residence import Residence
from uoe_peft.streaming.states import Entered, States, check_folder, own_folder

T = TypeVar("T")


class StreamedModel(nn.Module):
    """A causal language model of which one decoder layer at a time is in memory.

    It is an instance of the model's own class, too, and goes where a model goes: `attribute_experts`, `get_peft_model`,
    `UnlearningTrainer`. A call brings each layer in and drops the one before, so that a single call reads the whole
    checkpoint. Those who have many calls to make say so, see :mod:`uoe_peft.moe.passes`: then all batches go through a
    layer before the next one is read, which happens while this one computes.

    What an adapter edits is brought in for good. Base weights are read-only: they have no gradient, are in no
    `state_dict`, and are not saved.
    """

    _residence: Residence
    _on_disk: dict[int, ExpertsOnDisk]
    _identity: str
    _state_dir: Path | None
    _state_memory: int
    _entered: Entered
    show_progress: bool

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        state_dir: str | Path | None = None,
        state_memory: int = 2 * 2**30,
        layer_memory: int | None = None,
        show_progress: bool = True,
        trust_remote_code: bool = False,
    ) -> StreamedModel:
        """Open a checkpoint without reading its weights.

        The headers of all its shards are read, and a model is made of them without data, so that what is missing or
        does not fit is known now.

        Args:
            name: A folder with safetensors files, or a name on the Hub, whose shards are downloaded when they are read.
            dtype: What is computed in; "auto" for what the checkpoint names. CPUs without bfloat16 arithmetic want
                "float32".
            revision: On the Hub.
            state_dir: Folder for hidden states, from which a run that was stopped goes on; None: none is kept. Of
                several processes each has a folder of its own in it.
            state_memory: Bytes of hidden states in memory; beyond them temporary files are used. Where experts are read
                in blocks, what they put out may take as much again, and passes go through a layer in groups for which
                it does: each group reads the experts once.
            layer_memory: Bytes of memory for a decoder layer while it comes in; None: what is free. Where layers take
                more, their routed experts stay on disk and are read in blocks, see
                :mod:`uoe_peft.streaming.on_disk`.
            show_progress: Whether to show a bar of layers where many passes are run.
            trust_remote_code: As in transformers.

        Raises:
            UnsupportedModelError: The model has no routed experts, is an encoder-decoder, or is quantised in a form
                that cannot be made plain layer by layer.
            ValueError: No such checkpoint; a shard is missing or cut off; the index or the shards lack tensors, or have
                them in other shapes than the model; a layer does not fit into memory; `state_dir` cannot be written.
        """
        if state_dir is not None:
            check_folder(Path(state_dir))
        checkpoint = Checkpoint.open(name, revision=revision)
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        quantizer = find_dequantizer(config, checkpoint.name)
        skeleton = make_skeleton(without_quantisation(config), dtype, trust_remote_code=trust_remote_code)
        with no_loading_bar():
            headers = checkpoint.headers() if quantizer is None else plain_headers(skeleton, checkpoint, quantizer)
        model = without_weights(skeleton, checkpoint, headers)
        find_moe_blocks(model)  # says what is wrong with a model that has none
        model.requires_grad_(False).eval()
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
        reader = PartReader(skeleton, checkpoint, dtypes, quantizer)
        residence = Residence(model, reader, part_paths(model), torch.device("cpu"))
        on_disk = _fit(model, residence, available_memory() if layer_memory is None else int(layer_memory))
        load_when_called(model, residence)
        # An instance of both classes, under the name that configurations and messages know.
        own = type(model)
        model.__class__ = type(own.__name__, (cls, own), {"__module__": own.__module__})
        streamed = cast(StreamedModel, model)
        streamed._residence, streamed._on_disk = residence, on_disk
        streamed._identity = checkpoint.identity
        streamed.show_progress = show_progress
        streamed._state_dir = None if state_dir is None else Path(state_dir)
        streamed._state_memory, streamed._entered = state_memory, Entered(state_memory // 4)
        return streamed

    @property
    def device(self) -> torch.device:
        """Where layers are brought to."""
        return self._residence.device

    def keep_layers(self, layer_indices: Iterable[int]) -> None:
        """Have decoder layers in memory from now on; of experts that stay on disk, those alone that are asked for.

        Raises:
            ValueError: There is no such layer, or there is too little memory.
        """
        self._residence.keep(self._known(layer_indices))

    def check_layers(self, layer_indices: Iterable[int]) -> None:
        """Whether decoder layers could be kept in memory, for gradients to go through them.

        Raises:
            ValueError: There is no such layer, or there is too little memory.
        """
        wanted = self._known(layer_indices)
        above = [layer_idx for layer_idx in wanted[1:] if layer_idx in self._on_disk]
        if above:
            needed = sum(self._on_disk[layer_idx].num_bytes for layer_idx in above)
            raise ValueError(
                f"gradients are to go through the decoder layers {wanted}, of which {above} have routed experts that "
                f"do not fit into memory ({needed / GIB:.1f} GiB) and are read in blocks: edit one layer with "
                "forget_loss='rmu' and retain_loss='embed_diff' or 'none', which end at it, or open the model with a "
                "layer_memory that holds a layer"
            )
        self._residence.check_room(wanted)

    def run_layer_by_layer(
        self, passes: Sequence[Pass[T]], *, layer_indices: Sequence[int], read: Read
    ) -> Iterator[tuple[T, list[Tensor | None]]]:
        """Results of many passes, all of which go through a layer before the next one is read.

        Arguments as in :func:`uoe_peft.moe.passes.run_passes`.

        Raises:
            ValueError: There is too little memory or disk for the passes, which is said before the first layer is read.
        """
        model = cast(PreTrainedModel, self)
        embedded = States(limit=self._state_memory // 2, folder=None, key="")
        edited = lowest_edited_layer(model)
        sweeps = LayerSweeps(
            model,
            self._residence,
            passes,
            layer_indices=layer_indices,
            read=read,
            embedded=embedded,
            on_disk=self._on_disk,
            together=self._state_memory,
            edited=edited,
            entered=self._entered,
        )
        key = f"{self._identity}-{_way_of_computing(model)}-{sweeps.embed()}"
        self._check_memory(sweeps.num_tokens)
        # What an adapter computes is no part of the key.
        folder = None if edited is not None or self._state_dir is None else own_folder(self._state_dir)
        if edited is None:
            self._entered.clear()
        states = States(limit=self._state_memory // (2 if edited is None else 4), folder=folder, key=key)
        try:
            yield from sweeps.run(states, key=key, show_progress=self.show_progress)
            states.remove()
        finally:
            states.close()
            embedded.close()
            self._residence.drop_all()

    def _known(self, layer_indices: Iterable[int]) -> list[int]:
        wanted = [int(layer_idx) for layer_idx in layer_indices]
        unknown = [layer_idx for layer_idx in wanted if layer_idx not in self._residence]
        if unknown:
            raise ValueError(
                f"the model has {len(list(find_layers(self).children()))} decoder layers, got layer {unknown[0]}"
            )
        return wanted

    def _check_memory(self, num_tokens: Sequence[int]) -> None:
        """Whether there is memory for a layer, the hidden states and the largest batch."""
        model, there = cast(PreTrainedModel, self), available_memory()
        if self.device.type != "cpu" or there is None:
            return
        self._residence.drop_all()
        layer = self._residence.least_bytes
        states = min(self._state_memory, 2 * sum(num_tokens) * model.config.get_text_config().hidden_size * 4)
        batch = working_bytes(model, max(num_tokens, default=0), model.dtype.itemsize)
        if self._on_disk:
            layer += max(experts.num_block_bytes for experts in self._on_disk.values())
            waiting = sum(num_tokens) * model.config.get_text_config().hidden_size * model.dtype.itemsize
            states += min(self._state_memory, interrupted_bytes(model, waiting))
        if layer + states + batch > there:
            raise ValueError(
                f"a layer of {model.name_or_path} takes {layer / GIB:.1f} GiB to bring in, hidden states "
                f"{states / GIB:.1f} GiB and a batch of {max(num_tokens)} tokens about {batch / GIB:.1f} GiB, together "
                f"more than the {there / GIB:.1f} GiB that are free; use a smaller batch_size or max_length, a lower "
                "state_memory, or a narrower dtype"
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: most weights are not there.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a StreamedModel cannot be saved, its weights are where they were read from; save the adapter, and merge "
            "it into the checkpoint on disk with merge_checkpoint"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamedModel:
        dtype = cast(PreTrainedModel, self).dtype
        probe = fn(torch.empty(0, dtype=dtype, device=self.device))
        if probe.dtype != dtype:
            raise ValueError(f"a StreamedModel computes in {dtype}; open it with dtype={probe.dtype} instead")
        self._residence.device = probe.device
        return super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)


def _way_of_computing(model: PreTrainedModel) -> str:
    """Changes with whatever would give other hidden states from the same weights."""
    config = model.config
    kernels = [getattr(config, name, None) for name in ("_attn_implementation", "_experts_implementation")]
    said = (config.to_json_string(use_diff=False), *kernels, model.dtype, transformers.__version__, torch.__version__)
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _fit(model: PreTrainedModel, residence: Residence, limit: int | None) -> dict[int, ExpertsOnDisk]:
    """Experts that stay on disk, by layer: none where a layer fits into memory.

    Raises:
        ValueError: A layer does not fit without them either.
    """
    whole = residence.least_bytes
    if limit is None or whole <= limit:
        return {}
    on_disk = leave_on_disk(model, residence, limit=limit)
    needed = residence.least_bytes + (bytes_of_blocks(model) if on_disk else 0)
    if needed > limit:
        without = "its experts cannot be read apart"
        if on_disk:
            without = f"{needed / GIB:.1f} GiB with its routed experts read one at a time"
        raise ValueError(
            f"a layer of {model.name_or_path} takes {whole / GIB:.1f} GiB to bring in ({without}), more than the "
            f"{limit / GIB:.1f} GiB that are free; open it in a narrower dtype, or close other programs"
        )
    return on_disk
