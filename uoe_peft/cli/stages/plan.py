"""Say how much memory and time unlearning takes, from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoConfig

from uoe_peft.cli.parsing import parse
from uoe_peft.cli.planning import plan_unlearning


@dataclass(kw_only=True)
class PlanArguments:
    """Which model, how much data, how fast a device."""

    model_name_or_path: str = field(metadata={"help": "Folder with the config.json, or name on the Hub."})
    layer_idx: int | None = field(default=None, metadata={"help": "Layer of the expert; None: the middle one."})
    rows: int = field(default=400, metadata={"help": "Rows of the forget set."})
    tokens_a_row: int = field(default=256, metadata={"help": "Mean length of a row."})
    batch_size: int = field(default=4, metadata={"help": "Forget rows a forward pass."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the forget set."})
    tflops: float = field(default=100.0, metadata={"help": "What the device reaches; a third of its peak is good."})


def run(arguments: Sequence[str]) -> None:
    """Print the plan."""
    (options,) = parse("plan", arguments, PlanArguments)
    given = dict(vars(options))
    config = AutoConfig.from_pretrained(given.pop("model_name_or_path"))
    print(plan_unlearning(config, **given).summary())
