"""Put the figures of a report, and your own words, on an adapter's model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uoe_peft.cli.parsing import parse
from uoe_peft.cli.picture import draw_scores
from uoe_peft.cli.stages.report import load_reports
from uoe_peft.evaluation import UnlearningReport
from uoe_peft.export.saved_adapter import read_config
from uoe_peft.tuner import write_card


@dataclass(kw_only=True)
class CardArguments:
    """Which adapter, which report, which words."""

    adapter: str = field(metadata={"help": "Folder of the adapter."})
    report: str | None = field(default=None, metadata={"help": "Folder that evaluate wrote, or its report.json."})
    forgets: str | None = field(default=None, metadata={"help": "What is forgotten, in your own words."})


def run(arguments: Sequence[str]) -> None:
    """Write `README.md`, and `report.png` where there is a report; nothing of the report's texts is in either."""
    (options,) = parse("card", arguments, CardArguments)
    folder, config = Path(options.adapter), read_config(options.adapter)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a name on the Hub; download it, and pass its folder")
    record = dict(config.provenance or {})
    if options.forgets is not None:
        record["forgets"] = options.forgets
    if options.report is not None:
        (report,) = load_reports([f"report={options.report}"]).values()
        record["figures"] = figures_of(report)
        draw_scores(folder / "report.png", report)
    config.provenance = record
    config.save_pretrained(str(folder))
    write_card(folder, {"default": config})
    print(f"written: {folder / 'README.md'}")


def figures_of(report: UnlearningReport) -> dict[str, float]:
    """The scores of each model on each set, by names without spaces."""
    return {
        f"{name}_{metric}_{model}": round(value, 4)
        for model, sets in report.scores.items()
        for name, scores in sets.items()
        for metric in ("rouge_l_recall", "probability")
        if (value := getattr(scores, metric)) is not None
    }
