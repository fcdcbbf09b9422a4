"""Say what is in an adapter, without its base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from uoe_peft.cli.parsing import parse
from uoe_peft.export import describe_adapter


@dataclass
class InspectArguments:
    """Which adapter."""

    adapter: str = field(metadata={"help": "The adapter: folder, or name on the Hub."})


def run(arguments: Sequence[str]) -> None:
    """Print a table of its deltas, and where it comes from."""
    (options,) = parse("inspect", arguments, InspectArguments)
    print(describe_adapter(options.adapter).summary())
