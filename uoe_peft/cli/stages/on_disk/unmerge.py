"""Take an adapter out of a merged checkpoint on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from uoe_peft.cli.parsing import parse
from uoe_peft.export import unmerge_checkpoint


@dataclass
class UnmergeArguments:
    """Which checkpoint, which backup, where to."""

    merged: str = field(metadata={"help": "Folder that `merge` wrote."})
    backup: str = field(metadata={"help": "Folder that `merge` was given for the original slices."})
    output: str = field(metadata={"help": "Folder to make; it must not exist, or be empty."})
    dry_run: bool = field(default=False, metadata={"help": "List tensors and bytes, write nothing."})
    link: bool = field(default=True, metadata={"help": "Hard-link untouched shards instead of copying them."})


def run(arguments: Sequence[str]) -> None:
    """Write the original checkpoint and print what changed."""
    (options,) = parse("unmerge", arguments, UnmergeArguments)
    print(unmerge_checkpoint(**asdict(options)).summary())
