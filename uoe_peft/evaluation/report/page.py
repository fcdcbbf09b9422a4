"""A report as one page that needs no network: pictures, tables, answers side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from uoe_peft.evaluation.report.elements import bar_figures, figure, key, page, table
from uoe_peft.evaluation.report.markdown import MODEL_NAMES, SHOWN, attack_table, is_sweep, number
from uoe_peft.evaluation.report.pictures import COLOURS, Bar, bars, frontier, heat_map
from uoe_peft.palette import BASE, FORGET, OTHERS, RETAIN

if TYPE_CHECKING:
    from uoe_peft.evaluation.report.report import UnlearningReport

_NUM_ANSWERS = 6  # of each set


def render(report: UnlearningReport, *, title: str) -> str:
    """The report as HTML."""
    parts = [
        _head(report, title),
        _overview(report),
        _tables(report),
        _topics(report),
        _attacks(report),
        _calibration(report),
        _routing(report),
        _answers(report),
        _footer(report),
    ]
    return page(title, parts)


def _head(report: UnlearningReport, title: str) -> str:
    settings = report.settings
    what = [str(settings[name]) for name in ("suite", "model", "adapter", "dtype") if settings.get(name)]
    targets = settings.get("target_experts")
    what += [f"experts {', '.join(f'{layer}:{expert}' for layer, expert in targets)}"] if targets else []
    hidden = "the attacks below show what is only hidden." if report.attacks else "no attack was run."
    lines = [f"<h1>{escape(title)}</h1>", f'<p class="quiet">{escape(" · ".join(what))}</p>']
    if "retrained" in report.scores:
        for model in (name for name in ("unlearned", "calibrated") if name in report.scores):
            verdict = report.verdict(model)
            gone = "down to the retrained model's score" if verdict.forgotten else "still above the retrained model's"
            kept = "kept" if verdict.kept else "not kept"
            lines.append(
                f"<p><b>{escape(MODEL_NAMES[model])}</b>: the forget sets are {gone} (+ 0.05); "
                f"95\u00a0% of the base model's score on every retain set is {kept}.</p>"
            )
    lines.append(f'<p class="quiet">This is what the models say when asked plainly; {hidden}</p>')
    return "\n".join(lines)


def _overview(report: UnlearningReport) -> str:
    forget, retain = report.sets_of("forget")[0], report.sets_of("retain")[0]
    points = [(model, COLOURS[model], sets[forget].score, sets[retain].score) for model, sets in report.scores.items()]
    groups = [
        (f"{name} ({role})", [_bar(model, sets[name].score) for model, sets in report.scores.items()])
        for name, role in report.roles.items()
    ]
    line = [] if report.calibration is None else _curve(report.calibration.curve)
    drawn = frontier(points, line, title="retain score over forget score of each model")
    scored = bars(groups, title="score of each model on each set")
    return (
        f'<h2>Forgotten and kept</h2>{_key(report)}<div class="grid">{figure("Score on each set", scored)}'
        f"{figure('Kept over still known', drawn)}</div>"
        '<p class="quiet">Score: ROUGE-L recall of the answers; of sets with options, their accuracy; of plain text, '
        "the probability.</p>"
    )


def _tables(report: UnlearningReport) -> str:
    parts = ['<h2>All metrics</h2><p class="quiet">Means over the examples, with 95 % bootstrap intervals.</p>']
    for name, role in report.roles.items():
        present = [m for m in SHOWN if any(m in sets[name].metrics for sets in report.scores.values())]
        rows = []
        for model, sets in report.scores.items():
            found = (sets[name].metrics.get(metric) for metric in present)
            rows.append([model, *(f"{i.mean:.3f} [{i.low:.2f}, {i.high:.2f}]" if i else "-" for i in found)])
        size = next(iter(report.scores.values()))[name].num_examples
        parts.append(f"<h3>{escape(name)} ({escape(role)}, {size} examples)</h3>{table(['model', *present], rows)}")
    names = sorted({name for own in report.metrics.values() for name in own})
    if names:
        rows = [[model, *(number(own.get(name)) for name in names)] for model, own in report.metrics.items()]
        parts.append(f"<h3>Whole models</h3>{table(['model', *names], rows)}")
    return "\n".join(parts)


def _topics(report: UnlearningReport) -> str:
    if not report.by_value:
        return ""
    drawn = []
    for place in dict.fromkeys((part.set_name, part.column) for part in report.by_value):
        own = [part for part in report.by_value if (part.set_name, part.column) == place]
        groups = [(part.value, [_bar(model, scores.score) for model, scores in part.scores.items()]) for part in own]
        drawn.append(figure(f"{place[0]} set by {place[1]}", bars(groups, title=f"score by {place[1]}")))
    return f'<h2>Scores by value</h2>{_key(report)}<div class="grid">{"".join(drawn)}</div>'


def _attacks(report: UnlearningReport) -> str:
    if not report.attacks:
        return ""
    names = list(report.attacks[0].result.before)
    shown = next((name for name in names if name.startswith("forget")), names[0])
    groups: dict[str, list[Bar]] = {}
    for run in report.attacks:
        if is_sweep(run.result):
            continue  # a sweep ends at the base; the table has its curve
        after = run.result.after.get(shown, 0.0)
        text = f"{run.result.before.get(shown, 0.0):.2f} → {after:.2f}"
        groups.setdefault(run.result.name, []).append(Bar(after, COLOURS[run.model], text))
    return (
        f'<h2>Attacks</h2><p>What comes back: {escape(shown)} after each attack. What an attack "recovers" of the '
        f"retrained model, which never knew it, is the baseline.</p>"
        f"{key({MODEL_NAMES[model]: COLOURS[model] for model in dict.fromkeys(run.model for run in report.attacks)})}"
        f"{bar_figures(list(groups.items()), caption=f'{shown} after')}{table(*attack_table(report))}"
    )


def _calibration(report: UnlearningReport) -> str:
    found = report.calibration
    if found is None:
        return ""
    chosen = "No scale will do" if found.scale is None else f"Chosen scale: {found.scale:.3f}"
    rows = [[number(value) for value in point.values()] for point in found.curve]
    steady = "" if found.monotone else " The measure is not monotone: only what was measured is known."
    return (
        f"<h2>Calibration</h2><p>{chosen} ({escape(found.metric)}, limit {number(found.limit)}).{steady} A weaker "
        f"adapter forgets less deeply: compare the attacks at both scales.</p>{table(list(found.curve[0]), rows)}"
    )


def _routing(report: UnlearningReport) -> str:
    if not report.routing:
        return ""
    forget = report.sets_of("forget")[0]
    layers = [shift for shift in report.routing if shift.set_name == forget]
    targets = [tuple(pair) for pair in report.settings.get("target_experts") or ()]
    places = {shift.layer_idx: place for place, shift in enumerate(layers)}
    marked = [(places[layer], expert) for layer, expert in targets if layer in places]
    labels = [str(shift.layer_idx) for shift in layers]
    highest = max(max(*shift.affinity_off, *shift.affinity_on) for shift in layers)
    maps = [
        figure(
            f"Affinity for the forget set, adapter {state} (layer × expert)",
            heat_map(
                [getattr(shift, f"affinity_{state}") for shift in layers],
                labels,
                marked=marked,
                highest=highest,
                title=state,
            ),
        )
        for state in ("off", "on")
    ]
    palette = dict(zip(report.roles, (FORGET, "#d98a94", RETAIN, BASE, *OTHERS), strict=False))
    groups = [
        (
            f"layer {layer}",
            [
                Bar(shift.jaccard, palette.get(shift.set_name, "#999"), f"{shift.jaccard:.3f}")
                for shift in report.routing
                if shift.layer_idx == layer
            ],
        )
        for layer in places
    ]
    sets = dict.fromkeys(shift.set_name for shift in report.routing)
    key = "".join(f'<span><i style="background:{palette.get(name, "#999")}"></i>{escape(name)}</span>' for name in sets)
    overlap = bars(groups, title="overlap of selected experts by layer and set")
    return (
        "<h2>Routing</h2><p>Do tokens still go where the base model sends them? Overlap (Jaccard) of the experts that "
        "are selected with the adapter off and on; 1: the same. Framed: the unlearned experts.</p>"
        f'<div class="grid">{"".join(maps)}<figure><figcaption>Overlap of selected experts</figcaption>'
        f'<p class="key">{key}</p>{overlap}</figure></div>'
    )


def _answers(report: UnlearningReport) -> str:
    """The forget questions that are answered best, and of other sets those that lost most: the worst of each."""
    if report.examples is None or "rouge_l_recall_unlearned" not in report.examples.column_names:
        return ""
    rows: list[dict[str, Any]] = [row for row in report.examples if row["rouge_l_recall_unlearned"] is not None]
    parts = []
    for name, role in report.roles.items():
        own = [row for row in rows if row["set"] == name]

        def badness(row: Mapping[str, Any], role: str = role) -> float:
            known = float(row["rouge_l_recall_unlearned"])
            return known if role == "forget" else float(row["rouge_l_recall_base"]) - known

        worst = sorted(own, key=badness, reverse=True)[:_NUM_ANSWERS] if role != "holdout" else []
        if worst:
            what = "most of the truth is still said" if role == "forget" else "most was lost"
            cards = "".join(_card(row, list(report.scores)) for row in worst)
            parts.append(f'<h3>{escape(name)}: where {what}</h3><div class="grid">{cards}</div>')
    return f"<h2>Answers</h2>{''.join(parts)}" if parts else ""


def _card(row: Mapping[str, Any], models: Sequence[str]) -> str:
    said = "".join(
        f"<dt>{escape(MODEL_NAMES[model])}, ROUGE-L {row[f'rouge_l_recall_{model}']:.2f}</dt>"
        f"<dd>{escape(row[f'answer_{model}'] or '(nothing)')}</dd>"
        for model in models
    )
    truth = f"<dt>truth</dt><dd>{escape(row['truth'])}</dd>"
    return f"<article><h3>{escape(row['prompt'])}</h3><dl>{truth}{said}</dl></article>"


def _footer(report: UnlearningReport) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    cost = table(["what", "value"], [[name, number(value)] for name, value in report.cost.items()])
    settings = escape(json.dumps(dict(report.settings), indent=2))
    return (
        (f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "")
        + (f"<h2>Cost</h2>{cost}" if report.cost else "")
        + (f"<h2>Settings and versions</h2><pre>{settings}</pre>" if report.settings else "")
    )


def _bar(model: str, value: float) -> Bar:
    return Bar(value, COLOURS[model], f"{value:.2f}")


def _curve(curve: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """Forget and retain score along the scale: of each set, the first measure."""
    names = [next((name for name in curve[0] if name.startswith(f"{role}_")), None) for role in ("forget", "retain")]
    if None in names:
        return []
    return [(point[str(names[0])], point[str(names[1])]) for point in curve]


def _key(report: UnlearningReport) -> str:
    return key({MODEL_NAMES[model]: COLOURS[model] for model in report.scores})
