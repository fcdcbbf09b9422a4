"""Pictures of an attribution. Needs matplotlib: `pip install 'uoe-peft[plots]'`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from uoe_peft.attribution.affinities import Affinities, Pair


def plot(attribution: Affinities, path: str | PathLike[str], *, targets: Sequence[Pair]) -> None:
    """Draw the heat map of affinities, and the long tail of the layer of the first target.

    Args:
        attribution: What to draw.
        path: Picture to write; the ending names the format.
        targets: Experts to mark, the best first.

    Raises:
        ImportError: matplotlib is not installed.
    """
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
    figure.savefig(path, dpi=150)


def _heat_map(figure: Any, axes: Any, attribution: Affinities, targets: Sequence[Pair]) -> None:
    layers = list(attribution.layer_indices)
    image = axes.imshow(attribution.affinity.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label=f"affinity ({attribution.score})")
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), [str(layer_idx) for layer_idx in layers[::step]])
    for layer_idx, expert_idx in targets:
        axes.plot(expert_idx, layers.index(layer_idx), marker="s", mfc="none", mec="red", mew=1.5, ms=9)
    axes.set(xlabel="expert", ylabel="layer", title=f"Affinity to the forget set; marked: {_named(targets)}")


def _long_tail(axes: Any, attribution: Affinities, target: Pair) -> None:
    layer_idx, expert_idx = target
    row = attribution.layer_indices.index(layer_idx)
    assert attribution.forget is not None
    share = attribution.forget.top_k * attribution.forget.token_ratio[row]  # (E,)
    order = share.argsort(descending=True)
    places = range(len(order))
    axes.bar(places, share[order].numpy(), color="tab:orange", label="forget")
    if attribution.retain is not None:
        retain = attribution.retain.top_k * attribution.retain.token_ratio[row]
        axes.plot(places, retain[order].numpy(), color="tab:blue", marker=".", label="retain")
    axes.axvline(order.tolist().index(expert_idx), color="red", lw=0.8, label=f"expert {expert_idx}")
    axes.set(
        xlabel="experts, the busiest first", ylabel="share of tokens", title=f"Use of the experts of layer {layer_idx}"
    )
    axes.legend()


def _named(targets: Sequence[Pair]) -> str:
    return "; ".join(f"layer {layer_idx}, expert {expert_idx}" for layer_idx, expert_idx in targets)
