"""Many evaluations of one suite side by side: their scores, and what each attack brings back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from uoe_peft.evaluation.report import elements
from uoe_peft.evaluation.report.markdown import along, cell, is_sweep, number, table
from uoe_peft.evaluation.report.pictures import COLOURS, Bar, frontier
from uoe_peft.palette import CALIBRATED, FORGET, OTHERS, RETAIN, RETRAINED

if TYPE_CHECKING:
    from uoe_peft.evaluation.attacks.result import AttackResult
    from uoe_peft.evaluation.report.report import ModelName, UnlearningReport

Table = tuple[list[str], list[list[str]]]
_PALETTE = (FORGET, RETAIN, CALIBRATED, *OTHERS)
_OF_THE_MODEL = ("experts", "routing_of")  # settings that differ between models for no other reason than that


@dataclass(frozen=True)
class _Attacked:
    """One model of the comparison: what it is called, and its attacks by name."""

    label: str
    colour: str
    results: Mapping[str, AttackResult]


def side_by_side(reports: Mapping[str, UnlearningReport]) -> str:
    """Markdown tables of many evaluations: the scores, and what comes back under each attack.

    Args:
        reports: By the name that the table gives them; they must have the same sets.

    Raises:
        ValueError: There are none, or their sets differ.
    """
    parts = [table(*scores(reports))]
    head, rows = attacks(reports)
    if rows:
        parts += [table(head, rows), *unequal_budgets(reports)]
    return "\n\n".join(parts)


def render_comparison(reports: Mapping[str, UnlearningReport], *, title: str) -> str:
    """The same as a page with its pictures; errors are the same."""
    scored = scores(reports)
    first = next(iter(reports.values()))
    forget, retain = first.sets_of("forget")[0], first.sets_of("retain")[0]
    base = first.scores["base"]
    points = [("base", COLOURS["base"], base[forget].score, base[retain].score)]
    for place, (label, report) in enumerate(reports.items()):
        own = report.scores["unlearned"]
        points.append((label, _PALETTE[place % len(_PALETTE)], own[forget].score, own[retain].score))
    drawn = frontier(points, [], title="forget and retain score of each evaluation")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="grid">{elements.figure("Kept over still known", drawn)}</div>',
        "<h2>Scores</h2>" + elements.table(*scored),
        _attack_section(reports),
    ]
    return elements.page(title, parts)


def scores(reports: Mapping[str, UnlearningReport]) -> Table:
    """Head and rows: the unlearned model of each evaluation, the base of the first, and a twin; errors as above."""
    if not reports:
        raise ValueError("there are no reports to compare; pass at least one")
    first_name, first = next(iter(reports.items()))
    for name, report in reports.items():
        if list(report.roles) != list(first.roles):
            raise ValueError(
                f"{name} has the sets {list(report.roles)}, {first_name} has {list(first.roles)}; "
                "only evaluations of the same suite can stand in one table"
            )
    names = sorted({name for report in reports.values() for own in report.metrics.values() for name in own})
    rows = []
    for called, _, report, model in _compared(reports):
        own = report.metrics.get(model, {})
        cells = [cell(report.scores[model][part]) for part in report.roles]
        rows.append([called, *cells, *(number(own.get(name)) for name in names)])
    return ["model", *first.roles, *names], rows


def attacks(reports: Mapping[str, UnlearningReport]) -> Table:
    """Head and rows: a row an attack, a column a model; the first forget and retain measure, and a sweep's curve.

    No rows where nothing was attacked.
    """
    attacked = _attacked(reports)
    names = list(dict.fromkeys(name for model in attacked for name in model.results))
    rows = [["none", *(_measures(next(iter(model.results.values())).before) for model in attacked)]] if names else []
    for name in names:
        own = (model.results.get(name) for model in attacked)
        rows.append([name, *("-" if result is None else _cell(result) for result in own)])
    return ["forget / retain after", *(model.label for model in attacked)], rows


def unequal_budgets(reports: Mapping[str, UnlearningReport]) -> list[str]:
    """A line for each attack that did not have the same settings on all models: such numbers do not compare."""
    attacked = _attacked(reports)
    lines = []
    for name in dict.fromkeys(name for model in attacked for name in model.results):
        budgets = {model.label: _budget(model.results[name]) for model in attacked if name in model.results}
        (first, budget), *others = budgets.items()
        different = [label for label, other in others if other != budget]
        if different:
            lines.append(f"{name}: not the same budget for {first} and {', '.join(different)}; these do not compare.")
    return lines


def _attack_section(reports: Mapping[str, UnlearningReport]) -> str:
    attacked = _attacked(reports)
    head, rows = attacks(reports)
    if not rows:
        return ""
    shown = next(iter(next(iter(attacked)).results.values())).before
    measure = next(name for name in shown if name.startswith("forget"))
    groups = []
    for name in (row[0] for row in rows[1:]):
        own = [_bar(model, measure, name) for model in attacked if name in model.results]
        if not any(is_sweep(model.results[name]) for model in attacked if name in model.results):  # it ends at the base
            groups.append((name, own))
    notes = "".join(f"<p>{escape(line)}</p>" for line in unequal_budgets(reports))
    return (
        f"<h2>Attacks</h2><p>What comes back: {escape(measure)} after each attack, with equal budgets. What an attack "
        '"recovers" of the retrained model, which never knew it, is the baseline.</p>'
        f"{elements.key({model.label: model.colour for model in attacked})}"
        f"{elements.bar_figures(groups, caption=f'{measure} after')}{elements.table(head, rows)}{notes}"
    )


def _compared(reports: Mapping[str, UnlearningReport]) -> Iterator[tuple[str, str, UnlearningReport, ModelName]]:
    """What each row is called, its report's name, the report, and which of its models."""
    label, first = next(iter(reports.items()))
    yield "base", label, first, "base"
    for label, report in reports.items():
        yield label, label, report, "unlearned"
        if "calibrated" in report.scores:
            yield f"{label}, calibrated", label, report, "calibrated"
    twin = next(((label, report) for label, report in reports.items() if "retrained" in report.scores), None)
    if twin:
        yield "retrained", *twin, "retrained"


def _attacked(reports: Mapping[str, UnlearningReport]) -> list[_Attacked]:
    colours = {label: _PALETTE[place % len(_PALETTE)] for place, label in enumerate(reports)}
    found = []
    for called, label, report, model in _compared(reports):
        results = {run.result.name: run.result for run in report.attacks if run.model == model}
        if results:
            own = {"retrained": RETRAINED, "calibrated": f"{colours[label]}88"}  # paler where the adapter is weaker
            found.append(_Attacked(called, own.get(model, colours[label]), results))
    return found


def _bar(model: _Attacked, measure: str, attack: str) -> Bar:
    before, after = (getattr(model.results[attack], when)[measure] for when in ("before", "after"))
    return Bar(after, model.colour, f"{before:.2f} → {after:.2f}")


def _budget(result: AttackResult) -> dict[str, object]:
    return {name: value for name, value in result.settings.items() if name not in _OF_THE_MODEL}


def _cell(result: AttackResult) -> str:
    return along(result, measures=_measures) if is_sweep(result) else _measures(result.after)


def _measures(values: Mapping[str, float]) -> str:
    """Of each set, the first measure."""
    names = [next((name for name in values if name.startswith(f"{role}_")), None) for role in ("forget", "retain")]
    return " / ".join(f"{values[name]:.2f}" for name in names if name)
