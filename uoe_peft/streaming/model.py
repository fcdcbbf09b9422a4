"""A model whose decoder layers stay on disk and are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.passes import Pass, Read
from uoe_peft.moe.segments import find_layers
from uoe_peft.streaming.checkpoint import Checkpoint
from uoe_peft.streaming.layer_major import LayerSweeps
from uoe_peft.streaming.loading import load_when_called, part_paths
from uoe_peft.streaming.reader import PartReader, no_loading_bar
from uoe_peft.streaming.residence import Residence, physical_memory
from uoe_peft.streaming.states import States

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
    _key: str
    _state_dir: Path | None
    _state_memory: int
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
            state_dir: Folder for hidden states, from which a run that was stopped goes on; None: none is kept.
            state_memory: Bytes of hidden states in memory; beyond them temporary files are used.
            show_progress: Whether to show a bar of layers where many passes are run.
            trust_remote_code: As in transformers.

        Raises:
            UnsupportedModelError: The model has no routed experts, is an encoder-decoder, or is quantised.
            ValueError: No such checkpoint; a shard is missing or cut off; the index or the shards lack tensors, or have
                them in other shapes than the model; two of its layers do not fit into memory.
        """
        checkpoint = Checkpoint.open(name, revision=revision)
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        _check_config(config, checkpoint)
        skeleton = _skeleton(config, dtype, trust_remote_code=trust_remote_code)
        model = _without_weights(type(skeleton), config, checkpoint, skeleton.dtype)
        for buffer_name, buffer in skeleton.named_non_persistent_buffers():
            path, _, own_name = buffer_name.rpartition(".")
            model.get_submodule(path)._buffers[own_name] = buffer
        return _streamed(
            model, skeleton, checkpoint, state_dir=state_dir, state_memory=state_memory, show_progress=show_progress
        )

    @property
    def device(self) -> torch.device:
        """Where layers are brought to."""
        return self._residence.device

    def keep_layers(self, layer_indices: Iterable[int]) -> None:
        """Have decoder layers in memory from now on.

        Raises:
            ValueError: There is no such layer, or the machine has too little memory.
        """
        wanted = [int(layer_idx) for layer_idx in layer_indices]
        unknown = [layer_idx for layer_idx in wanted if layer_idx not in self._residence]
        if unknown:
            raise ValueError(
                f"the model has {len(list(find_layers(self).children()))} decoder layers, got layer {unknown[0]}"
            )
        self._residence.keep(wanted)

    def run_layer_by_layer(
        self, passes: Sequence[Pass[T]], *, layer_indices: Sequence[int], read: Read
    ) -> Iterator[tuple[T, list[Tensor | None]]]:
        """Results of many passes, all of which go through a layer before the next one is read.

        Arguments as in :func:`uoe_peft.moe.passes.run_passes`.
        """
        model = cast(PreTrainedModel, self)
        embedded = States(limit=self._state_memory // 2, folder=None, key="")
        sweeps = LayerSweeps(model, self._residence, passes, layer_indices=layer_indices, read=read, embedded=embedded)
        key = f"{self._key}-{sweeps.embed()}"
        # What an adapter computes is no part of the key.
        is_wrapped = any("base_layer" in module._modules for module in self.modules())
        states = States(limit=self._state_memory // 2, folder=None if is_wrapped else self._state_dir, key=key)
        try:
            yield from sweeps.run(states, show_progress=self.show_progress)
            states.remove()
        finally:
            states.close()
            embedded.close()
            self._residence.drop_all()

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


def _check_config(config: PreTrainedConfig, checkpoint: Checkpoint) -> None:
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None):
            raise UnsupportedModelError(
                f"{checkpoint.name} is quantised ({part.quantization_config}); stream the checkpoint that it was made "
                "from, in bfloat16 or float32"
            )
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{checkpoint.name} is an encoder-decoder; only decoders can be streamed")


def _skeleton(config: PreTrainedConfig, dtype: str | torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers are real."""
    if isinstance(dtype, str):
        named = config.dtype if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
        dtype = named
    # The class that the checkpoint names, which may be a model with towers that AutoModelForCausalLM leaves out.
    named_class = cast(Any, getattr(transformers, (config.architectures or [""])[0], None))
    with init_empty_weights(include_buffers=False), torch.random.fork_rng(devices=[]):
        if named_class is not None:
            return cast(PreTrainedModel, named_class._from_config(config, dtype=dtype))
        return cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code),
        )


def _without_weights(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype
) -> PreTrainedModel:
    """What `from_pretrained` makes of the checkpoint's headers: all of the model but its data.

    Raises:
        ValueError: Tensors are missing, or have other shapes.
    """
    headers = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in checkpoint.tensors.items()
    }
    with no_loading_bar():
        model, info = cast(Any, model_class).from_pretrained(
            None,
            config=config,
            state_dict=headers,
            device_map="meta",
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    for kind, problem in (("missing_keys", "has no"), ("mismatched_keys", "has another shape of")):
        if info[kind]:
            first = sorted(info[kind], key=str)[0]
            raise ValueError(
                f"{checkpoint.name} {problem} {first} ({len(info[kind])} such tensors): it is not a whole checkpoint "
                f"of a {model_class.__name__}; download or save it again"
            )
    model.config._name_or_path = model.name_or_path = checkpoint.name
    return cast(PreTrainedModel, model)


def _streamed(
    model: PreTrainedModel,
    skeleton: PreTrainedModel,
    checkpoint: Checkpoint,
    *,
    state_dir: str | Path | None,
    state_memory: int,
    show_progress: bool,
) -> StreamedModel:
    find_moe_blocks(model)  # says what is wrong with a model that has none
    model.requires_grad_(False).eval()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    reader = PartReader(skeleton, checkpoint, dtypes)
    residence = Residence(model, reader, part_paths(model), torch.device("cpu"))
    _check_memory(residence, checkpoint)
    load_when_called(model, residence)
    # An instance of both classes, under the name that configurations and messages know.
    cls = type(model)
    model.__class__ = type(cls.__name__, (StreamedModel, cls), {"__module__": cls.__module__})
    streamed = cast(StreamedModel, model)
    streamed._residence = residence
    streamed._key = f"{checkpoint.identity}-{skeleton.dtype}"
    streamed.show_progress = show_progress
    streamed._state_dir = None if state_dir is None else Path(state_dir)
    streamed._state_memory = state_memory
    return streamed


def _check_memory(residence: Residence, checkpoint: Checkpoint) -> None:
    largest, there = max(residence.num_bytes(key) for key in residence.parts), physical_memory()
    if there is not None and 2 * largest > there:
        raise ValueError(
            f"two layers of {checkpoint.name} take {2 * largest / 2**30:.1f} GiB, more than the "
            f"{there / 2**30:.1f} GiB of this machine; open it in a narrower dtype"
        )
