"""Pictures of an attribution. Needs matplotlib: `pip install 'uoe-peft[plots]'`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from uoe_peft.attribution.affinities import Affinities, Pair
from uoe_peft.palette import AFFINITY, FORGET, MARK, RETAIN, SIGNED_AFFINITY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_BARS = 24  # more numbers would overlap


def plot(attribution: Affinities, path: str | PathLike[str], *, targets: Sequence[Pair]) -> None:
    """Draw the heat map of affinities, and the long tail of the layer of the first target.

    Args:
        attribution: What to draw.
        path: Picture to write; the ending names the format.
        targets: Experts to mark, the best first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_of(attribution, targets).savefig(path, dpi=150)


def figure_of(attribution: Affinities, targets: Sequence[Pair]) -> Figure:
    """The picture that `plot` writes; arguments and errors are the same."""
    try:
        # Not pyplot: that would choose a backend and keep the figure for the whole process.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'uoe-peft[plots]'") from error
    num_panels = 1 if attribution.forget is None else 2
    figure = Figure(figsize=(6.4 * num_panels, 4.2), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    _heat_map(figure, panels[0], attribution, targets)
    if attribution.forget is not None:
        _long_tail(panels[1], attribution, targets[0])
    return figure


def _heat_map(figure: Any, axes: Any, attribution: Affinities, targets: Sequence[Pair]) -> None:
    from matplotlib.patches import Rectangle

    layers, affinity = list(attribution.layer_indices), attribution.affinity.numpy()
    signed = bool((affinity < 0).any())
    bound = float(abs(affinity[affinity == affinity]).max())  # NaN: not measured, left blank
    image = axes.imshow(
        affinity,
        aspect="auto",
        cmap=SIGNED_AFFINITY if signed else AFFINITY,
        vmin=-bound if signed else 0,
        vmax=bound,
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axes, label=f"affinity ({attribution.score})")
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer_idx) for layer_idx in layers[::step]])
    for layer_idx, expert_idx in targets:
        corner = (expert_idx - 0.5, layers.index(layer_idx) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MARK, linewidth=2))
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"Affinity to the forget set; framed: {_named(targets)}", loc="left", fontsize=11)


def _long_tail(axes: Any, attribution: Affinities, target: Pair) -> None:
    layer_idx, expert_idx = target
    row = attribution.layer_indices.index(layer_idx)
    assert attribution.forget is not None
    share = attribution.forget.top_k * attribution.forget.token_ratio[row]  # (E,)
    shown = _busiest(share.argsort(descending=True).tolist(), chosen=expert_idx)
    both = attribution.retain is not None
    width = 0.42 if both else 0.84
    axes.bar([place - both * width / 2 for place in range(len(shown))], share[shown].numpy(), width, color=FORGET)
    if attribution.retain is not None:
        retain = attribution.retain.top_k * attribution.retain.token_ratio[row]
        axes.bar([place + width / 2 for place in range(len(shown))], retain[shown].numpy(), width, color=RETAIN)
    axes.set_xticks(range(len(shown)), [str(expert) for expert in shown], fontsize=8)
    mark = axes.get_xticklabels()[shown.index(expert_idx)]
    mark.set(fontweight="bold", bbox={"boxstyle": "square,pad=0.25", "fc": "none", "ec": MARK})
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel="expert, the busiest on the forget set first; framed: the chosen one", ylabel="share of tokens")
    among = "" if len(shown) == len(share) else f", {len(shown)} of {len(share)}"
    axes.set_title(f"Use of the experts of layer {layer_idx}{among}", loc="left", fontsize=11)
    names = ["forget", "retain"] if both else ["forget"]
    axes.legend(axes.containers, names, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _busiest(order: list[int], *, chosen: int) -> list[int]:
    """As many experts as have room for their numbers, the chosen one among them."""
    shown = order[:_MOST_BARS]
    return shown if chosen in shown else [*shown[:-1], chosen]


def _named(targets: Sequence[Pair]) -> str:
    return "; ".join(f"layer {layer_idx}, expert {expert_idx}" for layer_idx, expert_idx in targets)
