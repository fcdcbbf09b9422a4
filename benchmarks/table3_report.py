"""Table and picture of the runs of `table3.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


def write_report(
    folder: Path,
    runs: Sequence[Run],
    references: References,
    *,
    target: float,
    parts: Sequence[str],
    first_seed: int,
) -> None:
    """Write `table3.json`, `table3.md` and `table3.png`."""
    cells = cells_of(runs, first_seed=first_seed)
    content: dict[str, Any] = {
        "forget_target": target,
        "references": references,
        "cells": [asdict(cell) for cell in cells.values()],
        "runs": [asdict(run) for run in runs],
    }
    (folder / "table3.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "table3.md").write_text(markdown(cells, references, target=target, parts=parts), encoding="utf-8")
    draw(folder / "table3.png", cells, references, target=target, parts=parts)


def markdown(cells: dict[tuple[str, str], Cell], references: References, *, target: float, parts: Sequence[str]) -> str:
    """The table, one row a loss and part."""
    lines = [
        f"ROUGE-L recall at matched forgetting (forget ≤ {target:.3f}); rows with * did not get there in all seeds.",
        "",
        "| loss | trained | forget | retain | lr | steps | seconds | trained share | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, scores in references.items():
        lines.append(f"| | {name} | {scores['forget']:.3f} | {scores['retain']:.3f} | | | | | |")
    for loss in dict.fromkeys(loss for loss, _ in cells):
        for part in parts:
            if (loss, part) in cells:
                lines.append(_row(cells[loss, part]))
    return "\n".join(lines) + "\n"


def _row(cell: Cell) -> str:
    mark = "" if cell.reached else f" * ({cell.num_reached} of {cell.num_runs})"
    spread = f" ± {cell.spread:.3f}" if cell.num_runs > 1 else ""
    return (
        f"| {cell.loss} | {cell.part} | {cell.forget:.3f}{mark} | {cell.retain:.3f}{spread} | {cell.rate:g} | "
        f"{cell.steps:.0f} | {cell.seconds:.1f} | {cell.trainable_share:.2%} | {cell.megabytes:.2f} |"
    )


def draw(
    path: Path,
    cells: dict[tuple[str, str], Cell],
    references: References,
    *,
    target: float,
    parts: Sequence[str],
) -> None:
    """What is kept by each method, where it has forgotten; pale bars have not."""
    from matplotlib.figure import Figure

    losses = list(dict.fromkeys(loss for loss, _ in cells))
    colours = ("#8da0b6", "#5b7aa3", "#6aa5a9", "#c9b458", "#e39b6d", "#d1495b", "#7a5195", "#2e6f57")
    figure = Figure(figsize=(9.5, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(parts)
    for place, part in enumerate(parts):
        for group, loss in enumerate(losses):
            cell = cells.get((loss, part))
            if cell is None:
                continue
            x = group + (place - (len(parts) - 1) / 2) * width
            axes.bar(
                x,
                cell.retain,
                width * 0.92,
                color=colours[place % len(colours)],
                alpha=1.0 if cell.reached else 0.25,
                yerr=cell.spread or None,
                label=part if group == 0 else None,
            )
            if not cell.reached:
                note = f"forget {cell.forget:.2f}"
                axes.text(x, 0.02, note, ha="center", va="bottom", rotation=90, fontsize=7, color="#444")
    for name, style in (("base", "-"), ("retrained", "--")):
        if name in references:
            axes.axhline(references[name]["retain"], color="#444", lw=0.8, ls=style, label=f"{name} model", zorder=0)
    axes.set_xticks(range(len(losses)), losses)
    axes.set(ylim=(0, 1.08), ylabel="retain ROUGE-L (held-out rows)")
    axes.set_title(f"What is kept once the forget set is forgotten (ROUGE-L ≤ {target:.2f}); pale: not forgotten")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
