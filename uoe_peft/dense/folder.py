"""A factorized model on disk: the dense checkpoint as it was, and a small file that says which neuron is where."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import AutoModelForCausalLM, PreTrainedModel

from uoe_peft.dense.factorizing import factorize
from uoe_peft.dense.groups import NeuronGroups

FILE = "neuron_groups.safetensors"


def is_factorized(folder: str | Path) -> bool:
    """Whether a folder holds groups of neurons beside a dense model. False for a name on the Hub."""
    return (Path(folder) / FILE).is_file()


def load_factorized(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The dense model in a folder, its neurons in the groups that lie beside it.

    Args:
        folder: What `uoe-peft factorize` wrote: a dense checkpoint with a file `neuron_groups.safetensors`.
        **options: Of `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken, or the groups are of another model.
        UnsupportedModelError: The model cannot be factorized.
    """
    groups = NeuronGroups.load(Path(folder) / FILE)
    return factorize(cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(folder, **options)), groups)
