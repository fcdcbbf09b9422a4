"""A report as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uoe_peft.evaluation.attacks.result import AttackResult, Scores
    from uoe_peft.evaluation.report.report import AnswerScores, UnlearningReport

MODEL_NAMES = {
    "base": "base (adapter off)",
    "unlearned": "unlearned (adapter on)",
    "calibrated": "calibrated (adapter weaker)",
    "retrained": "retrained without the forget set",
}
SHOWN = (
    "rouge_l_recall",
    "accuracy",
    "probability",
    "truth_ratio",
    "exact_memorization",
    "extraction_strength",
    "repetition",
)


def render(report: UnlearningReport) -> str:
    """The report as Markdown: scores with 95 % bootstrap intervals, and a section for each other part that it has."""
    parts = [f"# Unlearning report: {report.settings.get('suite', 'plain')}", _scores(report)]
    parts += [part for part in (_metrics(report), _values(report), _attacks(report), _calibration(report)) if part]
    parts += [part for part in (_routing(report), _cost(report), _notes(report)) if part]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells cannot break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_safe(str(cell)) for cell in line) + " |" for line in lines)


def cell(scores: AnswerScores) -> str:
    """A set's score with its interval."""
    name = "rouge_l_recall" if scores.rouge_l_recall is not None else "accuracy"
    interval = scores.metrics.get(name) or scores.metrics.get("probability")
    around = f" [{interval.low:.2f}, {interval.high:.2f}]" if interval else ""
    return f"{scores.score:.3f}{around}"


def number(value: float | None) -> str:
    """A number of any size in few characters; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def attack_table(report: UnlearningReport) -> tuple[list[str], list[list[str]]]:
    """Head and rows: all measures before and after, and where there is a curve, the first one along it."""
    if not report.attacks:
        return [], []
    names = list(report.attacks[0].result.before)
    order = list(dict.fromkeys(run.result.name for run in report.attacks))
    curves = any(run.result.curve for run in report.attacks)
    head = ["attack", "model", "scale", *(f"{name}: before → after" for name in names)]
    head += [f"{names[0]} along the way"] if curves else []
    rows = [
        [
            run.result.name,
            run.model,
            f"{run.scale:.2f}",
            *(f"{number(run.result.before.get(name))} → {number(run.result.after.get(name))}" for name in names),
            *([along(run.result, measures=lambda point: number(point.get(names[0])))] if curves else []),
        ]
        for run in sorted(report.attacks, key=lambda run: order.index(run.result.name))
    ]
    return head, rows


def is_sweep(result: AttackResult) -> bool:
    """Whether an attack went over scales, and so has no one end that says how strong it is."""
    return any("scale" in point for point in result.curve)


def along(result: AttackResult, *, measures: Callable[[Scores], str]) -> str:
    """What an attack measured on its way, such as "scale 1: 0.04, scale 0.8: 0.06"; empty where it has no curve."""
    place = next((name for point in result.curve for name in point if name not in result.before), "")
    return ", ".join(f"{place} {point[place]:g}: {measures(point)}" for point in result.curve)


def _scores(report: UnlearningReport) -> str:
    parts = []
    for name, role in report.roles.items():
        present = [m for m in SHOWN if any(m in sets[name].metrics for sets in report.scores.values())]
        rows = []
        for model, sets in report.scores.items():
            found = (sets[name].metrics.get(metric) for metric in present)
            cells = [f"{i.mean:.3f} [{i.low:.2f}, {i.high:.2f}]" if i else "-" for i in found]
            rows.append([MODEL_NAMES[model], *cells])
        size = next(iter(report.scores.values()))[name].num_examples
        parts.append(f"## {name} ({role}, {size} examples)\n\n{table(['model', *present], rows)}")
    return "\n\n".join(parts)


def _metrics(report: UnlearningReport) -> str:
    names = sorted({name for own in report.metrics.values() for name in own})
    if not names:
        return ""
    rows = [[MODEL_NAMES[model], *(number(own.get(name)) for name in names)] for model, own in report.metrics.items()]
    return "## Whole models\n\n" + table(["model", *names], rows)


def _values(report: UnlearningReport) -> str:
    rows = [
        [
            part.set_name,
            f"{part.column}: {part.value}",
            *(cell(part.scores[m]) if m in part.scores else "-" for m in report.scores),
        ]
        for part in report.by_value
    ]
    return "## By value\n\n" + table(["set", "value", *report.scores], rows) if rows else ""


def _attacks(report: UnlearningReport) -> str:
    if not report.attacks:
        return ""
    return "## Attacks\n\n" + table(*attack_table(report))


def _calibration(report: UnlearningReport) -> str:
    found = report.calibration
    if found is None:
        return ""
    chosen = "no scale will do" if found.scale is None else f"scale {found.scale:.3f}"
    safe = "" if found.monotone else "; the measure is not monotone"
    head = list(found.curve[0])
    rows = [[number(point[name]) for name in head] for point in found.curve]
    return f"## Calibration\n\n{found.metric} {number(found.limit)}: {chosen}{safe}.\n\n{table(head, rows)}"


def _routing(report: UnlearningReport) -> str:
    rows = [
        [shift.set_name, str(shift.layer_idx), f"{shift.jaccard:.3f}", number(shift.kl)] for shift in report.routing
    ]
    return "## Routing, adapter off against on\n\n" + table(["set", "layer", "Jaccard", "KL"], rows) if rows else ""


def _cost(report: UnlearningReport) -> str:
    rows = [[name, number(value)] for name, value in report.cost.items()]
    return "## Cost\n\n" + table(["what", "value"], rows) if rows else ""


def _notes(report: UnlearningReport) -> str:
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in report.notes) if report.notes else ""


def _safe(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
