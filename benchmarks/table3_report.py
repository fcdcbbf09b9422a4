"""Table and picture of the runs of `table3.py`.

    python benchmarks/table3_report.py "testbed=outputs/table3/table3.json" "TOFU=..." --picture table3.png

draws the tables of several grounds as one picture.
"""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

References = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One unlearning.

    Attributes:
        loss: "GA", "GDiff", "NPO" or "RMU".
        part: What was trained.
        rate: Learning rate.
        seed: Of training.
        forget: ROUGE-L recall on the forget set when training ended, in [0, 1]; NaN where the model diverged.
        retain: The same on held-out retain rows; 0 where the model diverged.
        reached: Whether the forget set counts as forgotten.
        steps: Optimiser steps.
        seconds: Training alone, without evaluation; without an accelerator, of the CPU.
        trainable: Trained parameters.
        total: Parameters of the base model.
        bytes: Size of what was trained.
        experts: `[layer_idx, expert_idx]` of the trained experts.
        curve: `[step, forget]` of each look at the forget set.
    """

    loss: str
    part: str
    rate: float
    seed: int
    forget: float
    retain: float
    reached: bool
    steps: int
    seconds: float
    trainable: int
    total: int
    bytes: int
    experts: list[list[int]]
    curve: list[list[float]]

    @property
    def diverged(self) -> bool:
        """Whether a loss became NaN or infinite."""
        return math.isnan(self.forget)

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What tells a run from others."""
        return self.loss, self.part, self.rate, self.seed

    @property
    def merit(self) -> tuple[bool, bool, float]:
        """What the better of two runs has more of: forgetting; a finite loss; retain (else less forget) score."""
        return self.reached, not self.diverged, self.retain if self.reached else -self.forget

    def summary(self) -> str:
        """One line."""
        mark = "" if self.reached else "  (not forgotten)"
        return (
            f"{self.loss:6} {self.part:15} lr {self.rate:<8g} seed {self.seed}: forget {self.forget:.3f}, "
            f"retain {self.retain:.3f}, {self.steps} steps, {self.seconds:.0f} s{mark}"
        )


@dataclass(frozen=True)
class Cell:
    """The runs of one loss and one part at its best learning rate; means over seeds, `spread` their deviation."""

    loss: str
    part: str
    rate: float
    forget: float
    retain: float
    spread: float
    num_reached: int
    num_runs: int
    steps: float
    seconds: float
    trainable_share: float
    megabytes: float

    @property
    def reached(self) -> bool:
        """Whether every seed got there."""
        return self.num_reached == self.num_runs


def cells_of(runs: Sequence[Run], *, first_seed: int) -> dict[tuple[str, str], Cell]:
    """Each cell at the learning rate with which `first_seed` forgot and kept most (or forgot most), over all seeds."""
    best: dict[tuple[str, str], Run] = {}
    for run in runs:
        known = best.get((run.loss, run.part))
        if run.seed == first_seed and (known is None or run.merit > known.merit):
            best[run.loss, run.part] = run
    return {
        key: _cell([run for run in runs if (run.loss, run.part, run.rate) == (*key, chosen.rate)])
        for key, chosen in best.items()
    }


def _cell(runs: Sequence[Run]) -> Cell:
    first = runs[0]
    return Cell(
        loss=first.loss,
        part=first.part,
        rate=first.rate,
        forget=fmean(run.forget for run in runs),
        retain=fmean(run.retain for run in runs),
        spread=stdev(run.retain for run in runs) if len(runs) > 1 else 0.0,
        num_reached=sum(run.reached for run in runs),
        num_runs=len(runs),
        steps=fmean(run.steps for run in runs),
        seconds=fmean(run.seconds for run in runs),
        trainable_share=fmean(run.trainable for run in runs) / first.total,
        megabytes=fmean(run.bytes for run in runs) / 1e6,
    )


@dataclass(frozen=True)
class Table:
    """All cells of one ground, by loss and part, and what they are compared with."""

    cells: dict[tuple[str, str], Cell]
    references: References
    target: float
    losses: Sequence[str]
    parts: Sequence[str]


def write_report(folder: Path, runs: Sequence[Run], table: Table) -> None:
    """Write `table3.json`, `table3.md` and `table3.png`."""
    content: dict[str, Any] = {
        "forget_target": table.target,
        "references": table.references,
        "losses": table.losses,
        "parts": table.parts,
        "cells": [asdict(cell) for cell in table.cells.values()],
        "runs": [asdict(run) for run in runs],
    }
    (folder / "table3.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    (folder / "table3.md").write_text(f"{summary(table)}\n{details(table)}", encoding="utf-8")
    draw(folder / "table3.png", {"": table})


def read_table(path: Path) -> Table:
    """The table of a `table3.json`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = {(cell["loss"], cell["part"]): Cell(**cell) for cell in content["cells"]}
    return Table(cells, content["references"], content["forget_target"], content["losses"], content["parts"])


def summary(table: Table) -> str:
    """One row a part: retain score for each loss, then costs; those of time relative to the first part's."""
    lines = [
        f"| trained | {' | '.join(table.losses)} | share trained | stored, MB | time of a step | time to the end |",
        "|---" * (len(table.losses) + 5) + "|",
    ]
    first = [table.cells.get((loss, table.parts[0])) for loss in table.losses]
    for part in table.parts:
        row = [table.cells.get((loss, part)) for loss in table.losses]
        own = [cell for cell in row if cell is not None]
        if not own:
            continue
        both = [(cell, other) for cell, other in zip(row, first, strict=True) if cell and other]
        step = fmean(cell.seconds / cell.steps / (other.seconds / other.steps) for cell, other in both)
        end = sum(cell.seconds for cell, _ in both) / sum(other.seconds for _, other in both)
        costs = f"{fmean(c.trainable_share for c in own):.2%} | {own[0].megabytes:.2f} | {step:.2f} | {end:.2f}"
        lines.append(f"| {part} | {' | '.join(_score(cell) for cell in row)} | {costs} |")
    return "\n".join(lines) + "\n"


def _score(cell: Cell | None) -> str:
    if cell is None:
        return ""
    spread = f" ± {cell.spread:.2f}" if cell.num_runs > 1 else ""
    return f"{cell.retain:.2f}{spread}" + ("" if cell.reached else f" * ({cell.forget:.2f})")


def details(table: Table) -> str:
    """One row a loss and part."""
    lines = [
        f"ROUGE-L recall at matched forgetting (forget ≤ {table.target:.3f}); * did not get there in all seeds.",
        "",
        "| loss | trained | forget | retain | lr | steps | seconds | trained share | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, scores in table.references.items():
        lines.append(f"| | {name} | {scores['forget']:.3f} | {scores['retain']:.3f} | | | | | |")
    for loss in table.losses:
        lines.extend(_row(table.cells[loss, part]) for part in table.parts if (loss, part) in table.cells)
    return "\n".join(lines) + "\n"


def _row(cell: Cell) -> str:
    mark = "" if cell.reached else f" * ({cell.num_reached} of {cell.num_runs})"
    spread = f" ± {cell.spread:.3f}" if cell.num_runs > 1 else ""
    return (
        f"| {cell.loss} | {cell.part} | {cell.forget:.3f}{mark} | {cell.retain:.3f}{spread} | {cell.rate:g} | "
        f"{cell.steps:.0f} | {cell.seconds:.1f} | {cell.trainable_share:.2%} | {cell.megabytes:.2f} |"
    )


def draw(path: Path, tables: dict[str, Table]) -> None:
    """What is kept by each method, where it has forgotten; a panel for each table, under its title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.3 + 2.5 * len(tables)), dpi=110, layout="constrained")
    panels = figure.subplots(len(tables), squeeze=False)[:, 0]
    for axes, (title, table) in zip(panels, tables.items(), strict=True):
        draw_table(axes, table)
        axes.set_title(f"{title}: forgotten at" * bool(title) + f" forget ROUGE-L ≤ {table.target:.2f}", fontsize=9)
    figure.suptitle("What is kept once the forget set is forgotten; pale bars: not forgotten", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


def draw_table(axes: Any, table: Table) -> None:
    """Bars of retain scores, grouped by loss, with their spread over seeds."""
    colours = ("#8da0b6", "#5b7aa3", "#6aa5a9", "#c9b458", "#e39b6d", "#d1495b", "#7a5195", "#2e6f57")
    width = 0.84 / len(table.parts)
    for (group, loss), (place, part) in product(enumerate(table.losses), enumerate(table.parts)):
        cell = table.cells.get((loss, part))
        if cell is None:
            continue
        x = group + (place - (len(table.parts) - 1) / 2) * width
        axes.bar(
            x,
            cell.retain,
            width * 0.92,
            color=colours[place % len(colours)],
            alpha=1.0 if cell.reached else 0.25,
            yerr=cell.spread or None,
            error_kw={"lw": 0.9},
            label=part if group == 0 else None,
        )
        if not cell.reached:
            note = f"forget {cell.forget:.2f}"
            axes.text(x, 0.02, note, ha="center", va="bottom", rotation=90, fontsize=7, color="#444")
    for name, style in (("base", "-"), ("retrained", "--")):
        if name in table.references:
            retain = table.references[name]["retain"]
            axes.axhline(retain, color="#444", lw=0.8, ls=style, label=f"{name} model", zorder=0)
    axes.set_xticks(range(len(table.losses)), table.losses)
    axes.set(ylim=(0, 1.08), ylabel="retain ROUGE-L")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw several tables as one picture, and print them."""
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("tables", nargs="+", help="title=path of a table3.json")
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    tables = {title: read_table(Path(path)) for title, _, path in (given.rpartition("=") for given in args.tables)}
    draw(args.picture, tables)
    for title, table in tables.items():
        print(f"{title}\n\n{summary(table)}")


if __name__ == "__main__":
    main()
