"""Tables and picture of the runs of `table3.py`.

    python benchmarks/table3_report.py "testbed=outputs/table3/table3.json" "TOFU=..." --picture table3.png

draws the frontiers of several grounds as one picture.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

References = dict[str, dict[str, float]]
# What of a run is reported: the look that is best under the limits; or its end, at full strength.
CHOICES = ("best look", "end")
AREA_LIMITS = tuple(step / 100 for step in range(51))
COLOURS = ("#5b6b7f", "#8fb3d9", "#6aa5a9", "#c9b458", "#e39b6d", "#d1495b", "#7a5195", "#2e6f57")
MARKERS = ("o", "s", "^", "D", "P", "X", "v", "*")


@dataclass(frozen=True)
class Look:
    """What one step and strength of a run gives on the validation half.

    Attributes:
        step: Optimiser steps.
        strength: Factor on the change of the weights; 0 is the base model.
        forget: ROUGE-L recall on forget rows, in [0, 1].
        retain: The same on retain rows that training has not seen.
        probability: Of the answers to forget rows, per token, in [0, 1].
    """

    step: int
    strength: float
    forget: float
    retain: float
    probability: float


@dataclass(frozen=True)
class Limits:
    """What counts as forgotten: ROUGE-L and probability of forget rows at or below these."""

    forget: float
    probability: float

    def met(self, look: Look) -> bool:
        """Whether a look is below both."""
        return look.forget <= self.forget and look.probability <= self.probability


@dataclass(frozen=True)
class Choice:
    """One of a run's looks.

    Attributes:
        look: That which was chosen.
        reached: Whether it is under the limits.
        test: Of its model, on the test half: "forget", "retain", "probability" and "refusals" of forget rows; "worst
            topic" of retain rows where they have topics; "relearned", the greatest forget score while all weights
            relearn other forget rows; "int4 forget" and "int4 retain", unless attacks were left out. Empty for a rate
            that lost in validation.
    """

    look: Look
    reached: bool
    test: dict[str, float] = field(default_factory=dict)

    @property
    def merit(self) -> tuple[bool, float]:
        """What the better of two has more of, on the validation half: forgetting; retain, else less forget."""
        return self.reached, self.look.retain if self.reached else -self.look.forget


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        loss: Row of `table3.LOSSES`.
        part: What was trained.
        rate: Learning rate.
        seed: Of training.
        looks: All looks at the validation half.
        choices: By name, see `CHOICES`.
        seconds: Of training alone, without looks; without an accelerator, of the CPU.
        cached: Whether training was allowed the prefix cache.
        trainable: Trained parameters.
        total: Parameters of the base model.
        bytes: Size of what was trained.
        experts: `[layer_idx, expert_idx]` of the trained experts.
    """

    loss: str
    part: str
    rate: float
    seed: int
    looks: list[Look]
    choices: dict[str, Choice]
    seconds: float
    cached: bool
    trainable: int
    total: int
    bytes: int
    experts: list[list[int]]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Run:
        """The run of a line of `runs.jsonl`."""
        looks = [Look(**look) for look in content["looks"]]
        choices = {
            name: Choice(**{**choice, "look": Look(**choice["look"])}) for name, choice in content["choices"].items()
        }
        return cls(**{**content, "looks": looks, "choices": choices})

    @property
    def key(self) -> tuple[str, str, float, int]:
        """What tells a run from others."""
        return self.loss, self.part, self.rate, self.seed

    def summary(self) -> str:
        """One line for the run, one for each choice."""
        lines = [f"{self.loss:15} {self.part:15} lr {self.rate:<7g} seed {self.seed}, {self.seconds:.1f} s"]
        for name, choice in self.choices.items():
            test = ", ".join(f"{key} {value:.3f}" for key, value in choice.test.items())
            mark = "" if choice.reached else "  (limits not met)"
            lines.append(f"    {name}: step {choice.look.step} x {choice.look.strength:g}, {test}{mark}")
        return "\n".join(lines)


def choose(name: str, looks: Sequence[Look], limits: Limits) -> Choice:
    """The best look; or the end, the last step at full strength."""
    found = best_look(looks, limits) if name == "best look" else max(looks, key=lambda look: (look.step, look.strength))
    return Choice(found, limits.met(found))


def best_look(looks: Sequence[Look], limits: Limits) -> Look:
    """The look with the best retain score under the limits; where none is under them, the one of least forget score."""
    under = [look for look in looks if limits.met(look)]
    return max(under, key=lambda look: look.retain) if under else min(looks, key=lambda look: look.forget)


@dataclass(frozen=True)
class Cell:
    """One choice of the runs of one loss and one part, at its best learning rate.

    `test` and `spread` are means and standard deviations over the seeds that were scored, for a deviation two or more;
    `area` is the mean, over forget limits from 0 to 0.5, of the best retain score under the limit, on the validation
    half over all rates of the first seed; `frontier` holds its corners as `[forget, retain]`. `cached_seconds`: with
    the prefix cache, where seeds were run with it.
    """

    choice: str
    loss: str
    part: str
    rate: float
    num_runs: int
    num_reached: int
    steps: list[int]
    strengths: list[float]
    test: dict[str, float]
    spread: dict[str, float]
    area: float
    frontier: list[list[float]]
    seconds: float
    cached_seconds: float | None
    trainable_share: float
    megabytes: float

    @property
    def reached(self) -> bool:
        """Whether every seed was under the limits on the validation half."""
        return self.num_reached == self.num_runs


def cells_of(runs: Sequence[Run], *, first_seed: int) -> dict[tuple[str, str, str], Cell]:
    """By choice, loss and part: all seeds at the rate that is best for `first_seed` on the validation half."""
    tried: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.seed == first_seed:
            tried.setdefault((run.loss, run.part), []).append(run)
    return {(name, *place): _cell(name, own, runs) for name in CHOICES for place, own in tried.items()}


def _cell(name: str, tried: Sequence[Run], runs: Sequence[Run]) -> Cell:
    best = max(tried, key=lambda run: run.choices[name].merit)
    own = [run for run in runs if (run.loss, run.part, run.rate) == (best.loss, best.part, best.rate)]
    choices = [run.choices[name] for run in own]
    points = [(look.forget, look.retain) for run in tried for look in run.looks]
    cached = [run.seconds for run in own if run.cached]
    # Further seeds may have been run without attacks.
    scores: dict[str, list[float]] = {}
    for key, value in chain.from_iterable(choice.test.items() for choice in choices):
        scores.setdefault(key, []).append(value)
    return Cell(
        choice=name,
        loss=best.loss,
        part=best.part,
        rate=best.rate,
        num_runs=len(own),
        num_reached=sum(choice.reached for choice in choices),
        steps=[choice.look.step for choice in choices],
        strengths=[choice.look.strength for choice in choices],
        test={key: fmean(values) for key, values in scores.items()},
        spread={key: stdev(values) for key, values in scores.items() if len(values) > 1},
        area=area(points),
        frontier=[list(corner) for corner in frontier(points)],
        seconds=fmean(run.seconds for run in own if not run.cached),
        cached_seconds=fmean(cached) if cached else None,
        trainable_share=best.trainable / best.total,
        megabytes=best.bytes / 1e6,
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The `(forget, retain)` that no other point beats in both, by ascending forget score."""
    corners: list[tuple[float, float]] = []
    for forget, retain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not corners or retain > corners[-1][1]:
            corners.append((forget, retain))
    return corners


def area(points: Sequence[tuple[float, float]]) -> float:
    """Mean over forget limits from 0 to 0.5 of the best retain score under the limit; 0 where nothing is under it."""
    return fmean(max((retain for forget, retain in points if forget <= limit), default=0.0) for limit in AREA_LIMITS)


@dataclass(frozen=True)
class Table:
    """All cells of one ground, by choice, loss and part, and what they are compared with."""

    cells: dict[tuple[str, str, str], Cell]
    references: References
    limits: Limits
    losses: Sequence[str]
    parts: Sequence[str]

    def row(self, part: str, *, choice: str) -> list[Cell | None]:
        """The cells of a part, loss by loss."""
        return [self.cells.get((choice, loss, part)) for loss in self.losses]


def write_report(folder: Path, runs: Sequence[Run], table: Table) -> None:
    """Write `table3.json`, `table3.md` and `table3.png`."""
    content: dict[str, Any] = {
        "limits": asdict(table.limits),
        "references": table.references,
        "losses": table.losses,
        "parts": table.parts,
        "cells": [asdict(cell) for cell in table.cells.values()],
        "runs": [asdict(run) for run in runs],
    }
    (folder / "table3.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    (folder / "table3.md").write_text(as_markdown(table), encoding="utf-8")
    draw(folder / "table3.png", {"": table})


def as_markdown(table: Table) -> str:
    """All tables, each choice with its title."""
    parts = [f"{name}\n\n{summary(table, choice=name)}" for name in CHOICES]
    parts += [costs(table), *(f"{name}\n\n{details(table, choice=name)}" for name in CHOICES)]
    return "\n".join(parts)


def read_table(path: Path) -> Table:
    """The table of a `table3.json`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = {(cell["choice"], cell["loss"], cell["part"]): Cell(**cell) for cell in content["cells"]}
    return Table(cells, content["references"], Limits(**content["limits"]), content["losses"], content["parts"])


def summary(table: Table, *, choice: str) -> str:
    """One row a part, for each loss: retain score (forget score after relearning)."""
    lines = [f"| trained | {' | '.join(table.losses)} |", "|---" * (len(table.losses) + 1) + "|"]
    lines += [f"| {part} | {' | '.join(map(_score, row))} |" for part, row in _rows(table, choice)]
    return "\n".join(lines) + "\n"


def _rows(table: Table, choice: str) -> Iterator[tuple[str, list[Cell | None]]]:
    return ((part, row) for part in table.parts if any(row := table.row(part, choice=choice)))


def _score(cell: Cell | None) -> str:
    if cell is None:
        return ""
    spread = f" ± {cell.spread['retain']:.2f}" if cell.num_runs > 1 else ""
    mark = "" if cell.reached else f" * {cell.test['forget']:.2f}"
    relearned = f" ({cell.test['relearned']:.2f})" if "relearned" in cell.test else ""
    return f"{cell.test['retain']:.2f}{spread}{mark}{relearned}"


def costs(table: Table) -> str:
    """One row a part: what training it costs, seconds as means over losses."""
    lines = ["| trained | share trained | stored, MB | CPU seconds | with the prefix cache |", "|---|---|---|---|---|"]
    for part, row in _rows(table, CHOICES[0]):
        own = [cell for cell in row if cell]
        cached = [cell.cached_seconds for cell in own if cell.cached_seconds is not None]
        with_cache = f"{fmean(cached):.1f}" if len(cached) == len(own) else ""
        size = f"{fmean(cell.trainable_share for cell in own):.2%} | {own[0].megabytes:.2f}"
        lines.append(f"| {part} | {size} | {fmean(cell.seconds for cell in own):.1f} | {with_cache} |")
    return "\n".join(lines) + "\n"


COLUMNS = ("forget", "probability", "retain", "worst topic", "refusals", "relearned", "int4 forget", "int4 retain")


def details(table: Table, *, choice: str) -> str:
    """One row a loss and part, on the test half."""
    limits = f"forget ROUGE-L ≤ {table.limits.forget:.3f} and probability ≤ {table.limits.probability:.3f}"
    lines = [
        f"Limits on the validation half: {limits}; * not met in all seeds. Means over seeds ± deviation.",
        "",
        f"| loss | trained | {' | '.join(COLUMNS)} | area | lr | step x strength | seeds |",
        "|---" * (len(COLUMNS) + 6) + "|",
    ]
    for name, scores in table.references.items():
        lines.append(f"| | {name} | {' | '.join(_value(scores, {}, column) for column in COLUMNS)} | | | | |")
    for place in product([choice], table.losses, table.parts):
        if place in table.cells:
            lines.append(_detail(table.cells[place]))
    return "\n".join(lines) + "\n"


def _detail(cell: Cell) -> str:
    values = " | ".join(_value(cell.test, cell.spread if cell.num_runs > 1 else {}, column) for column in COLUMNS)
    mark = "" if cell.reached else f" * ({cell.num_reached} of {cell.num_runs})"
    places = ", ".join(f"{step} x {strength:g}" for step, strength in zip(cell.steps, cell.strengths, strict=True))
    return (
        f"| {cell.loss} | {cell.part}{mark} | {values} | {cell.area:.3f} | {cell.rate:g} | {places} | {cell.num_runs} |"
    )


def _value(scores: Mapping[str, float], spread: Mapping[str, float], name: str) -> str:
    if name not in scores:
        return ""
    shows_spread = name in spread and name in ("retain", "relearned")
    return f"{scores[name]:.3f}" + (f" ± {spread[name]:.3f}" if shows_spread else "")


def draw(path: Path, tables: Mapping[str, Table]) -> None:
    """Retain against forget, and against forget after relearning; a row of two panels for each table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.9 + 4.2 * len(tables)), dpi=110, layout="constrained")
    panels = figure.subplots(len(tables), 2, squeeze=False, sharey="row")
    # One colour and one marker through all tables, in whatever order and number theirs are.
    parts = list(dict.fromkeys(part for table in tables.values() for part in table.parts))
    losses = list(dict.fromkeys(loss for table in tables.values() for loss in table.losses))
    for row, (title, table) in zip(panels, tables.items(), strict=True):
        for axes, name in zip(row, ("forget", "relearned"), strict=True):
            _draw_frontier(axes, table, name, parts=parts, losses=losses)
            axes.set_title(title, fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_frontier(axes: Any, table: Table, name: str, *, parts: Sequence[str], losses: Sequence[str]) -> None:
    """The cells of a table as points, those that missed a limit hollow; lines: the best of each part over all."""
    for place, part in enumerate(parts):
        colour = COLOURS[place % len(COLOURS)]
        cells = [cell for choice in CHOICES for cell in table.row(part, choice=choice) if cell]
        points = [(cell.test[name], cell.test["retain"]) for cell in cells if name in cell.test]
        if name == "forget":  # every look of the validation half; what is left after relearning is known of cells only
            points = [(forget, retain) for cell in cells for forget, retain in cell.frontier]
        cells = [cell for cell in cells if name in cell.test]
        if points:
            axes.plot(*zip(*frontier(points), strict=True), color=colour, lw=1.2, alpha=0.7)
        for cell in cells:
            marker = MARKERS[losses.index(cell.loss) % len(MARKERS)]
            face = colour if cell.reached else "none"
            axes.scatter(cell.test[name], cell.test["retain"], 42, marker=marker, edgecolors=colour, facecolors=face)
        axes.plot([], [], color=colour, lw=4, label=part)
    for place, loss in enumerate(losses):
        axes.plot([], [], ls="", marker=MARKERS[place % len(MARKERS)], color="#444", label=loss)
    twin = table.references.get("retrained")
    if twin is not None and name in twin:
        axes.plot(twin[name], twin["retain"], ls="", marker="*", ms=14, color="#111", label="retrained model")
    suffix = " after relearning" if name == "relearned" else ""
    axes.set(xlabel=f"forget ROUGE-L{suffix}", ylabel="retain ROUGE-L", ylim=(0, 1.03))
    if name == "forget":
        axes.set_xlim(0, max(AREA_LIMITS))
        axes.axvline(table.limits.forget, color="#444", lw=0.8, ls=":", label="forget limit")
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
        print(f"{title}\n\n{as_markdown(table)}")


if __name__ == "__main__":
    main()
