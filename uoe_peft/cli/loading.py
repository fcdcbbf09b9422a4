"""Models and data sets by the names that a command line can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from uoe_peft.precision import fast_dtype
from uoe_peft.streaming import StreamedModel

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_model(
    name: str, *, dtype: str, device_map: str | None, dequantize: bool = False, stream: bool = False
) -> PreTrainedModel:
    """A causal language model.

    Args:
        name: A folder, or a name on the Hub.
        dtype: "auto", or the name of a dtype.
        device_map: Where the model goes, as in transformers.
        dequantize: Turn weights that are stored in mxfp4 or FP8 into `dtype`: experts in such a form cannot be trained.

        stream: Leave the weights on disk and read them layer by layer; "auto" then means float32 where the CPU is slow
            in the dtype of the checkpoint.

    Raises:
        ValueError: `dequantize` for a model that is stored in another form; `stream` with `device_map` or `dequantize`.
    """
    if stream:
        if device_map is not None or dequantize:
            raise ValueError("stream reads layers from disk to one device; leave out device_map and dequantize")
        return cast(PreTrainedModel, StreamedModel.from_pretrained(name, dtype=_streamed_dtype(name, dtype)))
    quantization = {"quantization_config": _dequantized(name)} if dequantize else {}
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **quantization)


def _streamed_dtype(name: str, dtype: str) -> str | torch.dtype:
    stored = AutoConfig.from_pretrained(name).dtype if dtype == "auto" else None
    return fast_dtype(stored) if isinstance(stored, torch.dtype) else "float32" if dtype == "auto" else dtype


def _dequantized(name: str) -> Any:
    stored = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    asked = AutoQuantizationConfig.from_dict({**stored, "dequantize": True}) if stored else None
    if not getattr(asked, "dequantize", False):
        form = stored["quant_method"] if stored else "plain weights"
        raise ValueError(f"dequantize does not apply to {name}, which is stored as {form}; leave it out")
    return asked


def load_rows(source: str, *, split: str = "train") -> Dataset:
    """The rows of a data set.

    Args:
        source: A file (JSON, JSON lines, CSV, Parquet), a folder that `Dataset.save_to_disk` wrote, or the name of a
            set on the Hub, with its configuration after a colon where it has several: "locuslab/TOFU:forget10".
        split: Which split of a set on the Hub.

    Returns:
        The rows.

    Raises:
        ValueError: The file's type is not known, or the folder was not written by `Dataset.save_to_disk`.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise ValueError(f"cannot read {source}: expected a file that ends in {', '.join(_FORMATS)}")
        return load_dataset(_FORMATS[path.suffix], data_files=source, split="train")
    if path.is_dir():
        rows = load_from_disk(source)
        if not isinstance(rows, Dataset):
            raise ValueError(f"{source} holds several splits; pass the folder of one of them: {sorted(rows)}")
        return rows
    name, _, configuration = source.partition(":")
    return load_dataset(name, configuration or None, split=split)
