"""Pictures of an unlearning: where the knowledge sat, what each model answers, how training went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from uoe_peft.attribution import ExpertAttribution
from uoe_peft.evaluation import UnlearningReport
from uoe_peft.evaluation.report import SetName
from uoe_peft.palette import AFFINITY, BASE, FORGET, MARK, RETAIN, RETRAINED, SIGNED_AFFINITY, UNLEARNED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = {"rouge_l_recall": "ROUGE-L recall", "probability": "answer probability"}
_COLOURS = {"base": BASE, "unlearned": UNLEARNED, "retrained": RETRAINED}
_LABELS = {
    "base": "base (adapter off)",
    "unlearned": "unlearned (adapter on)",
    "retrained": "retrained without the topic",
}


def draw(
    path: str | PathLike[str],
    *,
    attribution: ExpertAttribution,
    targets: list[tuple[int, int]],
    report: UnlearningReport,
    topic: str,
) -> None:
    """Write a PNG: affinity of all experts with the targets marked, and the scores before and after.

    Args:
        path: Where to write.
        attribution: Affinity of each expert for the topic.
        targets: The unlearned experts, `(layer_idx, expert_idx)`.
        report: Scores of the models.
        topic: What was unlearned.

    Raises:
        ImportError: The package `matplotlib` is missing.
    """
    figure_of(attribution, targets, report=report, topic=topic).savefig(path)


def figure_of(
    attribution: ExpertAttribution, targets: list[tuple[int, int]], *, report: UnlearningReport, topic: str
) -> Figure:
    """The picture that `draw` writes; arguments and errors are the same."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs the package matplotlib: pip install 'uoe-peft[plots]'") from error
    layers_height = 1.2 + 0.34 * len(attribution.layer_indices)  # inches
    figure = Figure(figsize=(10, 3.4 + layers_height), dpi=150, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[layers_height, 3.4], hspace=0.05, squeeze=False).flat
    _heat_map(above.subplots(), attribution, targets=targets, topic=topic)
    bars = below.subplots(1, len(_METRICS), sharey=True)
    for axes, (metric, label) in zip(bars, _METRICS.items(), strict=True):
        _bars(axes, report, metric=metric, label=label)
    handles, labels = bars[0].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def draw_scores(path: str | PathLike[str], report: UnlearningReport) -> bool:
    """Write the scores of the models on the forget and the retain set.

    Returns:
        Whether the report has these sets, and matplotlib is there to draw them.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not all(set(get_args(SetName)) <= set(sets) for sets in report.scores.values()):
        return False
    figure = Figure(figsize=(10, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(_METRICS), sharey=True)
    for axes, (metric, label) in zip(panels, _METRICS.items(), strict=True):
        _bars(axes, report, metric=metric, label=label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path)
    return True


def _heat_map(axes: Axes, attribution: ExpertAttribution, *, targets: list[tuple[int, int]], topic: str) -> None:
    from matplotlib.patches import Rectangle

    affinity = attribution.affinity.numpy()
    signed = bool(np.nanmin(affinity) < 0)  # NaN: not measured, left blank
    bound = float(np.nanmax(abs(affinity)))
    image = axes.imshow(
        affinity,
        aspect="auto",
        cmap=SIGNED_AFFINITY if signed else AFFINITY,
        vmin=-bound if signed else 0.0,
        vmax=bound,
    )
    layer_indices = list(attribution.layer_indices)
    for layer_idx, expert_idx in targets:
        corner = (expert_idx - 0.5, layer_indices.index(layer_idx) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=2.5))
    named = ", ".join(f"layer {layer_idx}, expert {expert_idx}" for layer_idx, expert_idx in targets)
    axes.set_title(f"Affinity of the experts for “{topic}”; framed: {named}", fontsize=11, loc="left")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    step = max(1, affinity.shape[1] // 16)
    axes.set_xticks(range(0, affinity.shape[1], step))
    axes.set_yticks(range(len(layer_indices)), [str(layer_idx) for layer_idx in layer_indices])
    axes.tick_params(length=0)
    unit = "forget − retain" if signed else "forget set"
    axes.figure.colorbar(image, ax=axes, pad=0.01, label=f"mean gate score,\n{unit}")


def _bars(axes: Axes, report: UnlearningReport, *, metric: str, label: str) -> None:
    width = 0.8 / len(report.scores)
    sets = get_args(SetName)
    for place, (model, by_set) in enumerate(report.scores.items()):
        values = [getattr(by_set[name], metric) for name in sets]
        offset = (place - (len(report.scores) - 1) / 2) * width
        drawn = axes.bar(
            [position + offset for position in range(len(sets))],
            [value if value is not None else 0.0 for value in values],
            width=width * 0.94,
            color=_COLOURS[model],
            label=_LABELS[model],
        )
        shown = ["no prompts" if value is None else f"{value:.2f}" for value in values]
        axes.bar_label(drawn, labels=shown, padding=2, fontsize=9)
    axes.set_title(f"{label} (0 to 1)", fontsize=11, loc="left")
    axes.set_xticks(range(len(sets)), [f"{name} set" for name in sets])
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def draw_training(path: str | PathLike[str], log: Sequence[Mapping[str, Any]]) -> bool:
    """Write the training curve: token accuracy on forget and retain batches over the steps.

    Args:
        path: Picture to write; the ending names the format.
        log: The trainer's `state.log_history`.

    Returns:
        Whether there was anything to draw, and matplotlib to draw it with.
    """
    entries = [entry for entry in log if "forget_accuracy" in entry]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not entries:
        return False
    figure = Figure(figsize=(6.4, 3.4), dpi=150, layout="constrained")
    curves_on(figure.subplots(), entries)
    figure.savefig(path)
    return True


def curves_on(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    """Draw the accuracies of log entries, each curve with its name at its end."""
    ends = {}
    for role, colour in (("forget", FORGET), ("retain", RETAIN)):
        points = [(entry["step"], entry[f"{role}_accuracy"]) for entry in entries if f"{role}_accuracy" in entry]
        if points:
            steps, values = zip(*points, strict=True)
            # Not clipped: marks at 0 and 1 are shown whole.
            axes.plot(steps, values, color=colour, marker="o", markersize=3, linewidth=1.8, clip_on=False)
            ends[role, colour] = points[-1]
    heights = [height for _, height in ends.values()]
    close = len(heights) == 2 and abs(heights[0] - heights[1]) < 0.07  # the names would lie on each other
    upper = max(ends, key=lambda name: ends[name][1])[0] if ends else None
    for (role, colour), end in ends.items():
        aside = 0 if not close else 6 if role == upper else -6
        axes.annotate(role, end, (6, aside), textcoords="offset points", color=colour, va="center")
    axes.set(xlabel="optimiser step", ylabel="token accuracy", ylim=(0, 1.03))
    axes.set_title("What training forgets and keeps", fontsize=11, loc="left")
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
