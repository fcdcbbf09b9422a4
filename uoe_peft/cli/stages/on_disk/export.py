"""Write an adapter as plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from uoe_peft.cli.parsing import parse
from uoe_peft.export import export_lora


@dataclass
class ExportArguments:
    """Which adapter, in which format, where to."""

    adapter: str = field(metadata={"help": "The adapter: folder, or name on the Hub."})
    output: str = field(metadata={"help": "Folder to make; it must not exist, or be empty."})
    base: str = field(metadata={"help": "The base model: folder, or name on the Hub; only its config is read."})
    format: str = field(default="peft", metadata={"help": "peft; or per_expert, for vLLM, SGLang and llama.cpp."})
    rank: int | None = field(default=None, metadata={"help": "The most that an expert's delta may have."})
    max_error: float | None = field(default=None, metadata={"help": "Largest relative error of a full delta."})
    drop_router: bool = field(default=False, metadata={"help": "Leave routers out; the effect is measured."})
    revision: str | None = field(default=None, metadata={"help": "Of a base on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "For models with code of their own."})


def run(arguments: Sequence[str]) -> None:
    """Write the LoRA adapter and print ranks and errors."""
    (options,) = parse("export", arguments, ExportArguments)
    print(export_lora(**asdict(options)).summary())
