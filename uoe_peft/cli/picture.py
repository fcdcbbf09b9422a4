"""One picture of an unlearning: where the knowledge sat, and what each model answers."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, get_args

import numpy as np

from uoe_peft.attribution import ExpertAttribution
from uoe_peft.evaluation import UnlearningReport
from uoe_peft.evaluation.report import SetName

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = {"rouge_l_recall": "ROUGE-L recall", "probability": "answer probability"}
_COLOURS = {"base": "#8da0b6", "unlearned": "#d1495b", "retrained": "#2e6f57"}
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


def _heat_map(axes: Axes, attribution: ExpertAttribution, *, targets: list[tuple[int, int]], topic: str) -> None:
    from matplotlib.patches import Rectangle

    affinity = attribution.affinity.numpy()
    signed = bool(np.nanmin(affinity) < 0)  # NaN: not measured, left blank
    bound = float(np.nanmax(abs(affinity)))
    image = axes.imshow(
        affinity,
        aspect="auto",
        cmap="RdBu_r" if signed else "Blues",
        vmin=-bound if signed else 0.0,
        vmax=bound,
    )
    layer_indices = list(attribution.layer_indices)
    for layer_idx, expert_idx in targets:
        corner = (expert_idx - 0.5, layer_indices.index(layer_idx) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=2.5))
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
