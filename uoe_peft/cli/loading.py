"""Models and data sets by the names that a command line can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_model(name: str, *, dtype: str, device_map: str | None, dequantize: bool = False) -> PreTrainedModel:
    """A causal language model.

    Args:
        name: A folder, or a name on the Hub.
        dtype: "auto", or the name of a dtype.
        device_map: Where the model goes, as in transformers.
        dequantize: Turn weights that are stored in mxfp4 or FP8 into `dtype`: experts in such a form cannot be trained.

    Raises:
        ValueError: `dequantize` for a model that is stored in another form.
    """
    quantization = {"quantization_config": _dequantized(name)} if dequantize else {}
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **quantization)


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
