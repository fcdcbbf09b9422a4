"""Many evaluations of one suite side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uoe_peft.cli.options import OverwriteOption
from uoe_peft.cli.outputs import check_file
from uoe_peft.cli.parsing import parse
from uoe_peft.evaluation import UnlearningReport
from uoe_peft.evaluation.report.comparison import render_comparison, side_by_side


@dataclass(kw_only=True)
class ReportArguments(OverwriteOption):
    """Which reports."""

    reports: list[str] = field(
        metadata={"help": "Folders that evaluate wrote, or their report.json; NAME=FOLDER gives a name of its own."}
    )
    output: str = field(default="comparison", metadata={"help": "Path of comparison.md and .html, without ending."})
    title: str = field(default="Evaluations", metadata={"help": "Of the page."})


def run(arguments: Sequence[str]) -> None:
    """Print the table and write it as Markdown and HTML."""
    (options,) = parse("report", arguments, ReportArguments)
    for ending in (".md", ".html"):
        check_file(options.output + ending, overwrite=options.overwrite, option="output")
    reports = load_reports(options.reports)
    table = side_by_side(reports)
    target = Path(options.output)
    files = [target.with_name(target.name + ending) for ending in (".md", ".html")]
    files[0].write_text(f"# {options.title}\n\n{table}\n", encoding="utf-8")
    files[1].write_text(render_comparison(reports, title=options.title), encoding="utf-8")
    print(table)
    print(f"written: {', '.join(map(str, files))}")


def load_reports(sources: Sequence[str]) -> dict[str, UnlearningReport]:
    """Reports by the name that is given, or by the name of their folder.

    Raises:
        ValueError: There is no report, or two have the same name.
    """
    reports: dict[str, UnlearningReport] = {}
    for source in sources:
        name, separator, given = source.rpartition("=")
        path = Path(given if separator else source)
        file = path / "report.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"there is no report at {path}; pass a folder that `uoe-peft evaluate` wrote")
        label = name or file.resolve().parent.name
        if label in reports:
            raise ValueError(f"two reports are called {label!r}; write NAME={path} to name one")
        try:
            reports[label] = UnlearningReport.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no report ({error}); pass a folder that `uoe-peft evaluate` wrote") from error
    return reports
