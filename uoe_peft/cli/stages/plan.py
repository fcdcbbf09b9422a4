"""Say how much memory and time unlearning takes, from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from uoe_peft.cli.loading import load_config
from uoe_peft.cli.parsing import parse
from uoe_peft.cli.planning import plan_streaming, plan_unlearning


@dataclass(kw_only=True)
class PlanArguments:
    """Which model, how much data, how fast a device."""

    model_name_or_path: str = field(metadata={"help": "Folder with the config.json, or name on the Hub."})
    layer_idx: int | None = field(default=None, metadata={"help": "Layer of the expert; None: the middle one."})
    rows: int = field(default=400, metadata={"help": "Rows of the forget set."})
    tokens_a_row: int = field(default=256, metadata={"help": "Mean length of a row."})
    batch_size: int = field(default=4, metadata={"help": "Forget rows a forward pass."})
    epochs: float = field(default=3.0, metadata={"help": "Passes over the forget set."})
    tflops: float | None = field(
        default=None,
        metadata={"help": "What the device reaches; a third of its peak is good. None: 100, and 1 with --stream."},
    )
    stream: bool = field(default=False, metadata={"help": "Plan for layers that are read from disk, one at a time."})
    disk_gb_s: float | None = field(default=None, metadata={"help": "With --stream: speed of the disk; None: 3."})
    weight_bytes: int | None = field(
        default=None, metadata={"help": "Of a weight in memory; None: 2, and 4 (float32) with --stream."}
    )


def run(arguments: Sequence[str]) -> None:
    """Print the plan."""
    (options,) = parse("plan", arguments, PlanArguments)
    given = {name: value for name, value in vars(options).items() if value is not None}
    config = load_config(given.pop("model_name_or_path"))
    if given.pop("stream"):
        print(plan_streaming(config, **given).summary())
        return
    if "disk_gb_s" in given:
        raise ValueError("--disk_gb_s is for plans with --stream true; leave it out, or stream")
    print(plan_unlearning(config, **given).summary())
