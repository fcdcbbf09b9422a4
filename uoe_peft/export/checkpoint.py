"""A model's checkpoint on disk or on the Hub: which tensor is in which shard, and the model that it is for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from uoe_peft.checkpoints import INDEX, SINGLE, StoredTensor, TensorFile, read_weight_map, shard_path
from uoe_peft.dense import FILE as NEURON_GROUPS
from uoe_peft.dense import NeuronGroups, factorize

# Weights in other formats would carry what was forgotten into the output.
WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".index", ".data")
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in safetensors format.

    Attributes:
        name: What it was asked for by.
        folder: Where its files are.
        revision: On the Hub; None for the newest, and for a folder.
        weight_map: The shard of each tensor.
    """

    name: str
    folder: Path
    revision: str | None
    weight_map: dict[str, str]
    _files: dict[str, TensorFile] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, name: str | Path, *, revision: str | None = None) -> Checkpoint:
        """Find a checkpoint; of one on the Hub only its small files are downloaded.

        Args:
            name: A folder, or a name on the Hub.
            revision: On the Hub.

        Raises:
            ValueError: There is no such checkpoint, or none in safetensors format; or an index is missing, or cannot be
                read.
        """
        folder = Path(name)
        is_local = folder.is_dir()
        if not is_local:
            no_weights = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES)]
            try:
                folder = Path(snapshot_download(str(name), revision=revision, ignore_patterns=[*no_weights, "*/*"]))
            except (OSError, ValueError) as error:  # absent, offline, or a name that the Hub cannot have
                raise ValueError(
                    f"there is no folder {name} here, and the Hub did not give a checkpoint of this name "
                    f"({' '.join(str(error).split())[:120]}…); check the spelling and the connection"
                ) from error
        weight_map = _weight_map(folder, name, revision=revision, is_local=is_local)
        return cls(str(name), folder, revision, weight_map)

    @property
    def is_local(self) -> bool:
        """Whether it is a folder rather than a name on the Hub."""
        return Path(self.name).is_dir()

    @property
    def shards(self) -> list[str]:
        """File names of the weights."""
        return sorted(set(self.weight_map.values()))

    def shard(self, shard: str) -> TensorFile:
        """A shard, downloaded first where it must be.

        Raises:
            ValueError: It is missing, or cut off.
        """
        if shard not in self._files:
            if self.is_local:
                path = shard_path(self.folder, shard)
            else:
                path = Path(hf_hub_download(self.name, shard, revision=self.revision))
            self._files[shard] = TensorFile(path)
        return self._files[shard]

    def tensor(self, name: str) -> StoredTensor:
        """Where a tensor lies in its shard.

        Raises:
            ValueError: The shard does not hold what the index says.
        """
        shard = self.weight_map[name]
        stored = self.shard(shard).tensors.get(name)
        if stored is None:
            raise ValueError(f"{shard} of {self.name} has no tensor {name}, which its {INDEX} names")
        return stored

    @cached_property
    def other_files(self) -> tuple[list[Path], list[str]]:
        """Files beside the shards: those that belong to any copy of the model, and names of all others.

        The others are weights in other formats, and folders.
        """
        kept, left = [], []
        for path in sorted(self.folder.iterdir()):
            if path.name in self.weight_map.values():
                continue
            is_small = path.is_file() and path.suffix not in WEIGHT_SUFFIXES
            if is_small:
                kept.append(path)
            elif not path.name.startswith("."):
                left.append(path.name)
        return kept, left

    def meta_model(self, *, trust_remote_code: bool = False) -> PreTrainedModel:
        """The model without weights: names and shapes alone; a dense one that was factorized with its groups.

        Args:
            trust_remote_code: As in transformers.

        Raises:
            ValueError: The checkpoint is quantised.
        """
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust_remote_code)
        quantised = getattr(config.get_text_config(), "quantization_config", None) or getattr(
            config, "quantization_config", None
        )
        if quantised:
            method = dict(quantised).get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"{self.name} is quantised ({method}): its weights are stored with scales that an edit would have to "
                "change, too; merge into the checkpoint that it was made from, and quantise the result"
            )
        with torch.device("meta"):
            model = _build(config, trust_remote_code=trust_remote_code)
        groups = self.folder / NEURON_GROUPS
        return factorize(model, NeuronGroups.load(groups)) if groups.is_file() else model


def _build(config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    named = (config.architectures or [""])[0]
    model_class = cast(Any, getattr(transformers, named, None))
    if model_class is not None:
        return cast(PreTrainedModel, model_class._from_config(config))
    return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _weight_map(folder: Path, name: str | Path, *, revision: str | None, is_local: bool) -> dict[str, str]:
    if is_local or (folder / INDEX).is_file():
        return read_weight_map(folder)
    return dict.fromkeys(TensorFile(Path(hf_hub_download(str(name), SINGLE, revision=revision))).tensors, SINGLE)
