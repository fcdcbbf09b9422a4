"""Models and data sets by the names that a command line can hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, load_dataset, load_from_disk
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers.auto import AutoQuantizationConfig

from uoe_peft.cli.options import ColumnOptions
from uoe_peft.dense import FILE, is_factorized, load_factorized
from uoe_peft.precision import fast_dtype
from uoe_peft.streaming import StreamedModel

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate; anything else is a device
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def load_model(
    name: str, *, dtype: str, device_map: str | None, dequantize: bool = False, stream: bool = False
) -> PreTrainedModel:
    """A causal language model; a dense one that was factorized comes with its neurons in groups.

    Args:
        name: A folder, or a name on the Hub.
        dtype: "auto", or the name of a dtype.
        device_map: Where the model goes, as in transformers.
        dequantize: Turn weights that are stored in mxfp4 or FP8 into `dtype`: experts in such a form cannot be trained.
        stream: Leave the weights on disk and read them layer by layer; "auto" then means float32 where the CPU is slow
            in the dtype of the checkpoint.

    Raises:
        ValueError: `dequantize` for a model that is stored in another form, there is no such model, dtype or device, or
            `stream` with `device_map`, `dequantize` or a model that was factorized.
    """
    _check_model(name)
    _check_dtype(dtype)
    _check_device(device_map)
    if stream and is_factorized(name):
        raise ValueError(f"{name} was factorized ({FILE}), and is not read layer by layer; leave out stream")
    if stream:
        if device_map is not None or dequantize:
            raise ValueError("stream reads layers from disk to one device; leave out device_map and dequantize")
        return cast(PreTrainedModel, StreamedModel.from_pretrained(name, dtype=_streamed_dtype(name, dtype)))
    quantization = {"quantization_config": _dequantized(name)} if dequantize else {}
    load = load_factorized if is_factorized(name) else AutoModelForCausalLM.from_pretrained
    return _or_absent(name, lambda: load(name, dtype=dtype, device_map=device_map, **quantization))


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        ValueError: There is no such model.
    """
    _check_model(name)
    return cast(PreTrainedConfig, _or_absent(name, lambda: AutoConfig.from_pretrained(name)))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: There is no such model.
    """
    _check_model(name)
    return _or_absent(name, lambda: AutoTokenizer.from_pretrained(name))


def _check_dtype(dtype: str) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")


def _check_device(device_map: str | None) -> None:
    if device_map is None or device_map in _PLACEMENTS:
        return
    try:
        torch.empty(0, device=device_map)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"--device_map {device_map} is no device of this machine ({reason}); leave it out, or pass auto or cpu"
        ) from error


def _check_model(name: str) -> None:
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file; pass the folder that holds the model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder {name} has no config.json; pass the folder that holds the model")
    if not path.exists() and not _HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no folder {name}; pass the folder of a model, or its name on the Hub")


def _or_absent(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except OSError as error:
        if Path(name).exists():
            raise
        raise ValueError(
            f"there is no folder {name} here, and the Hub did not give a model of this name "
            f"({' '.join(str(error).split())[:120]}…); check the spelling and the connection"
        ) from error


def compute_dtype(name: str) -> str:
    """A type's name; of "auto" bfloat16's, or float32's where the CPU is slow in bfloat16."""
    return str(fast_dtype(torch.bfloat16)).removeprefix("torch.") if name == "auto" else name


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


def load_set(source: str, options: ColumnOptions) -> Dataset:
    """The rows of a data set, with the columns that the options name as prompt and completion.

    Raises:
        ValueError: As :func:`load_rows` and :func:`with_columns`.
    """
    rows = load_rows(source, split=options.dataset_split)
    return with_columns(
        rows, source, prompt=options.prompt_column, completion=options.completion_column, chat=options.chat
    )


def load_rows(source: str, *, split: str = "train") -> Dataset:
    """The rows of a data set.

    Args:
        source: A file (JSON, JSON lines, CSV, TSV, Parquet), a folder of such files or one that `Dataset.save_to_disk`
            wrote, or the name of a set on the Hub, with its configuration after a colon where it has several:
            "locuslab/TOFU:forget10".
        split: Which split of a set on the Hub.

    Returns:
        The rows, at least one.

    Raises:
        ValueError: There is no such set, it cannot be read, or it is empty.
    """
    path = Path(source)
    if path.is_file():
        rows = _from_files([path])
    elif path.is_dir():
        rows = _from_folder(path)
    else:
        rows = _from_hub(source, split)
    if len(rows) == 0:
        raise ValueError(f"{source} holds no rows")
    return rows


def _from_files(paths: Sequence[Path]) -> Dataset:
    (kind,) = {path.suffix for path in paths}
    if kind not in _FORMATS:
        raise ValueError(f"cannot read {paths[0]}: expected a file that ends in {', '.join(_FORMATS)}")
    empty = [path for path in paths if path.stat().st_size == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty; expected one row a line, or leave the file out")
    delimiter = {"delimiter": "\t"} if kind == ".tsv" else {}
    try:
        return load_dataset(_FORMATS[kind], data_files=list(map(str, paths)), split="train", **delimiter)
    except Exception as error:  # `datasets` wraps what its readers raise
        reason = error.__cause__ or error
        if "corresponds to no data" in str(reason):
            raise ValueError(f"{paths[0]} holds no rows; expected one row a line, or leave the file out") from error
        raise ValueError(f"cannot read {paths[0]} as {kind[1:]}: {' '.join(str(reason).split())[:200]}") from error


def _from_folder(folder: Path) -> Dataset:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        rows = load_from_disk(str(folder))
        if not isinstance(rows, Dataset):
            raise ValueError(f"{folder} holds several splits; pass the folder of one of them: {sorted(rows)}")
        return rows
    files = sorted(path for path in folder.iterdir() if path.suffix in _FORMATS)
    kinds = sorted({path.suffix for path in files})
    if len(kinds) != 1:
        held = (
            f"files of several kinds ({', '.join(kinds)})" if kinds else f"no file that ends in {', '.join(_FORMATS)}"
        )
        raise ValueError(f"the folder {folder} holds {held}; pass a file, or a folder of files of one kind")
    return _from_files(files)


def _from_hub(source: str, split: str) -> Dataset:
    name, _, configuration = source.partition(":")
    if not _HUB_NAME.fullmatch(source) or Path(source).suffix in _FORMATS:
        raise ValueError(f"there is no file or folder {source}; check the path, seen from {Path.cwd()}")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # absent, offline, another configuration or split: each with a type of its own
        raise ValueError(
            f"there is no file or folder {source} here, and the Hub did not give a set of this name: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def with_columns(rows: Dataset, source: str, *, prompt: str | None, completion: str | None, chat: bool) -> Dataset:
    """Rows with the named columns as "prompt" and "completion", as strings or as messages.

    Args:
        rows: Any rows.
        source: Where they come from, for errors.
        prompt: Column of the prompts; None: it is called so already.
        completion: Column of the answers, likewise.
        chat: Whether both become messages of a user and of the assistant.

    Raises:
        ValueError: A column that is named is absent, or `chat` with columns that hold no strings.
    """
    for name, column in (("prompt", prompt), ("completion", completion)):
        if column is None or column == name:
            continue
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column {column!r} for --{name}_column; it has {rows.column_names}")
        rows = (rows.remove_columns(name) if name in rows.column_names else rows).rename_column(column, name)
    if not chat:
        return rows
    lacking = {"prompt", "completion"} - set(rows.column_names)
    if lacking or not all(isinstance(rows[0][name], str) for name in ("prompt", "completion")):
        raise ValueError(
            f"--chat needs a prompt and a completion that are strings; {source} has the columns {rows.column_names}"
        )
    return rows.map(_as_messages)


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
