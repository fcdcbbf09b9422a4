"""Merge an adapter into a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from uoe_peft.cli.parsing import parse
from uoe_peft.export import merge_checkpoint


@dataclass
class MergeArguments:
    """Which checkpoint, which adapter, where to."""

    base: str = field(metadata={"help": "The base model's checkpoint: folder, or name on the Hub."})
    adapter: str = field(metadata={"help": "The adapter, likewise."})
    output: str = field(metadata={"help": "Folder to make; it must not exist, or be empty."})
    dry_run: bool = field(default=False, metadata={"help": "List tensors and bytes, write nothing."})
    link: bool = field(default=True, metadata={"help": "Hard-link untouched shards instead of copying them."})
    backup: str | None = field(default=None, metadata={"help": "Folder for the original slices; see unmerge."})
    only_touched: bool = field(default=False, metadata={"help": "Leave out shards that do not change."})
    revision: str | None = field(default=None, metadata={"help": "Of a base on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "For models with code of their own."})


def run(arguments: Sequence[str]) -> None:
    """Write the merged checkpoint and print what changed."""
    (options,) = parse("merge", arguments, MergeArguments)
    print(merge_checkpoint(**asdict(options)).summary())
