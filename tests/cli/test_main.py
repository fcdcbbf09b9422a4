"""The command itself: help, unknown stages, options from flags and files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from uoe_peft.cli import STAGES, main
from uoe_peft.cli.parsing import parse


@dataclass
class Options:
    rate: float = field(default=1.0, metadata={"help": "A number."})
    name: str = field(default="x", metadata={"help": "A word."})


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h", "demo"]])
def test_help_lists_the_stages(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {stage} " in shown for stage in STAGES)


def test_an_unknown_stage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["forget"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "unknown stage 'forget'; use one of demo, attribute, unlearn, solve" in said and len(said.splitlines()) == 2


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([stage, "--help"])
    assert stop.value.code == 0
    assert f"usage: uoe-peft {stage}" in capsys.readouterr().out


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rate: 2.5\nname: file\n")
    (options,) = parse("demo", ["--config", str(tmp_path / "a.yaml"), "--name", "flag"], Options)
    assert options == Options(rate=2.5, name="flag")


def test_an_unknown_option_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("colour: red\n")
    with pytest.raises(ValueError, match="colour"):
        parse("demo", ["--config", str(tmp_path / "a.yaml")], Options)
