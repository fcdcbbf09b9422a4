"""Options that stages share, under the same names everywhere. No stage needs torch to know them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model_name_or_path: str = field(
        metadata={"help": "Mixture-of-Experts model, or what factorize wrote: folder, or Hub name."}
    )
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, bfloat16, float16 or float32."})
    device_map: str | None = field(default=None, metadata={"help": "Where the model goes, for example auto."})
    dequantize: bool = field(default=False, metadata={"help": "For weights that are stored in mxfp4 or FP8."})
    stream: bool = field(default=False, metadata={"help": "Read the model from disk layer by layer: for any size."})


@dataclass(kw_only=True)
class ColumnOptions:
    """How the rows of data sets are read."""

    dataset_split: str = field(default="train", metadata={"help": "Split of sets on the Hub."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column that holds the prompts, such as question; None: prompt."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column that holds the answers, such as answer; None: completion."}
    )
    chat: bool = field(
        default=False, metadata={"help": "Put prompts and answers into the model's chat template, as user and model."}
    )


@dataclass(kw_only=True)
class OverwriteOption:
    """Whether an earlier result may be written over."""

    overwrite: bool = field(default=False, metadata={"help": "Write over the result of an earlier run."})
