"""Options of a stage, from the command line and from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl.scripts.utils import TrlParser


class _Parser(TrlParser):
    """TRL's parser, which answers a mistake with one line instead of two hundred options."""

    def error(self, message: str) -> NoReturn:
        """Stop with the message and where to read on."""
        said = re.sub(r"(--[\w-]+)/--[\w-]+", r"\1", message)  # each option has a second name, with hyphens
        self.exit(2, f"{self.prog}: {said}; {self.prog} --help lists the options\n")


def parse(stage: str, arguments: Sequence[str], *groups: Any) -> tuple[Any, ...]:
    """One filled-in dataclass for each of `groups`.

    Args:
        stage: Name of the stage, for the help text.
        arguments: What stands after the stage; `--config FILE.yaml` gives defaults, which other options override.
        groups: Dataclasses whose fields are the options.

    Returns:
        The dataclasses, in the order of `groups`.

    Raises:
        SystemExit: After `--help_all`; for an unknown or missing option, or a value that is none.
        ValueError: There is no such YAML file, it is not YAML, or it holds an unknown option.
    """
    parser = _Parser(groups, prog=f"uoe-peft {stage}", allow_abbrev=False)
    words, path = _without_config(parser, list(arguments))
    if "--help_all" in words:
        parser.print_help()
        parser.exit(0)
    known = sorted({action.dest for action in parser._actions})
    if path is not None:
        unknown = parser.set_defaults_with_config(**read_options(path))[::2]
        if unknown:
            name = unknown[0].removeprefix("--")
            raise ValueError(f"{path} has an option {name!r} that {stage} does not know{_meant(name, known)}")
    *filled, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if rest:
        unknown = [word for word in rest if word.startswith("--")] or rest
        name = unknown[0].removeprefix("--").partition("=")[0]
        parser.error(f"unknown option {unknown[0]}{_meant(name, known)}")
    return tuple(filled)


def _without_config(parser: _Parser, words: list[str]) -> tuple[list[str], str | None]:
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return words, None
    place = words.index("--config")
    if place + 1 == len(words):
        parser.error("--config needs a file")
    return words[:place] + words[place + 2 :], words[place + 1]


def read_options(path: str) -> Mapping[str, Any]:
    """The options that a YAML file holds.

    Raises:
        ValueError: There is no such file, it is not YAML, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; expected a YAML file with options")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options such as `batch_size: 8`, one a line")
    return {str(name): value for name, value in content.items()}


def _meant(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name.replace("-", "_"), known, n=1)
    return f"; did you mean --{close[0]}?" if close else ""
