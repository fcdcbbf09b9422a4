"""Options of a stage, from the command line and from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl.scripts.utils import TrlParser


def parse(stage: str, arguments: Sequence[str], *groups: Any) -> tuple[Any, ...]:
    """One filled-in dataclass for each of `groups`.

    Args:
        stage: Name of the stage, for the help text.
        arguments: What stands after the stage; `--config FILE.yaml` gives defaults, which other options override.
        groups: Dataclasses whose fields are the options.

    Returns:
        The dataclasses, in the order of `groups`.

    Raises:
        SystemExit: After `--help`, or for an unknown option.
        ValueError: The YAML file holds an unknown option.
    """
    parser = TrlParser(groups, prog=f"uoe-peft {stage}")
    return parser.parse_args_and_config(args=list(arguments))
