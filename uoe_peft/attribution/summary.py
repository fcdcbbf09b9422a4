"""What is said of an attribution: a table in plain text, and warnings where it may mislead."""

from __future__ import annotations

import warnings

from uoe_peft.attribution.affinities import Affinities, Pair
from uoe_peft.attribution.confidence import normalised_entropy, top_share

GENERALIST_LIFT = 1.5
"""An expert that is not used at least so many times as much on the forget set as on the retain set is a generalist."""

_HEADINGS = ("rank", "layer", "expert", "affinity", "95 % interval", "tokens", "retain", "lift")


class AttributionWarning(UserWarning):
    """The chosen expert may be the wrong one, or no expert may be the right one."""


class UnidentifiedExpertWarning(AttributionWarning):
    """The data cannot tell the best expert from the second."""


class GeneralistExpertWarning(AttributionWarning):
    """The best expert is about as busy on the retain set as on the forget set: unlearning it costs utility."""


def summary(attribution: Affinities, *, num_experts: int) -> str:
    """The best experts, how sure they are, and how the best one's layer spreads its tokens.

    Args:
        attribution: What to describe.
        num_experts: How many experts to list.

    Returns:
        Text of several lines. "tokens" is the share of forget tokens that reach the expert; "retain" that of retain
        tokens; "lift" how many times as much the forget set uses it.
    """
    ranked = attribution.ranking()[:num_experts]
    rows = [_HEADINGS]
    for rank, (layer_idx, expert_idx, affinity) in enumerate(ranked, start=1):
        pair = (layer_idx, expert_idx)
        rows.append((str(rank), str(layer_idx), str(expert_idx), f"{affinity:.4f}", *_details(attribution, pair)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([_title(attribution), *table, *_verdict(attribution, ranked[0][:2])])


def warn_if_doubtful(attribution: Affinities) -> None:
    """Warn the caller's caller where the best expert is not identified, or is a generalist."""
    sure = attribution.confidence
    first, second = attribution.ranking()[:2]
    best = first[:2]
    if sure is not None and not sure.identified:
        warnings.warn(
            f"the forget set does not single out one expert: (layer, expert) {best} has affinity {first[2]:.4f}, "
            f"{second[:2]} has {second[2]:.4f}, and the 95 % interval of the difference, {sure.margin_low:.4f} to "
            f"{sure.margin_high:.4f}, contains 0. Unlearning one expert may then miss part of the knowledge; use more "
            "data, another score, or top(m) with m > 1",
            UnidentifiedExpertWarning,
            stacklevel=3,
        )
    elif sure is None and attribution.forget is not None and attribution.forget.num_sequences < 2:
        warnings.warn(
            f"one sequence cannot tell how sure the choice of {best} is; use more data",
            UnidentifiedExpertWarning,
            stacklevel=3,
        )
    lift = attribution.lift(best)
    if lift is not None and lift < GENERALIST_LIFT:
        warnings.warn(
            f"(layer, expert) {best} is a generalist: the forget set uses it only {lift:.2f} times as much as the "
            f"retain set, expected at least {GENERALIST_LIFT}. Unlearning it will cost utility; try score='contrast'",
            GeneralistExpertWarning,
            stacklevel=3,
        )


def _title(attribution: Affinities) -> str:
    num_layers, num_experts = attribution.affinity.shape
    use = attribution.forget
    data = "no data" if use is None else f"{use.num_sequences:,} sequences, {use.num_tokens:,} tokens"
    gate = f" ({attribution.gate})" if attribution.score in ("gate", "contrast") else ""
    name = attribution.model_name or "a model"
    return f"{name}: score {attribution.score}{gate} of {num_layers} layers × {num_experts} experts; {data}"


def _details(attribution: Affinities, pair: Pair) -> tuple[str, str, str, str]:
    sure, forget, retain = attribution.confidence, attribution.forget, attribution.retain
    value, lift = attribution.value, attribution.lift(pair)
    interval = "" if sure is None else f"{value(sure.low, pair):.4f} to {value(sure.high, pair):.4f}"
    shares = ["" if use is None else f"{use.top_k * value(use.token_ratio, pair):.1%}" for use in (forget, retain)]
    return interval, shares[0], shares[1], "" if lift is None else f"{lift:.2f}"


def _verdict(attribution: Affinities, best: Pair) -> list[str]:
    lines = []
    if (sure := attribution.confidence) is not None:
        verdict = "identified" if sure.identified else "NOT identified: the interval includes 0"
        lines.append(
            f"first over second: {sure.margin:.4f} ({sure.margin_low:.4f} to {sure.margin_high:.4f}), {verdict}; "
            f"first in {sure.stability:.0%} of resamples"
        )
        if sure.half_agreement is not None:
            lines.append(f"two halves of the data agree on {sure.half_agreement:.0%} of each layer's best experts")
    if (use := attribution.forget) is not None:
        row = attribution.layer_indices.index(best[0])
        share = top_share(use.token_ratio, count=use.top_k)[row]
        entropy = normalised_entropy(use.token_ratio)[row]
        lines.append(
            f"layer {best[0]}: {share:.0%} of the selections fall on its {use.top_k} busiest experts, "
            f"entropy {entropy:.2f} of 1"
        )
    return lines
