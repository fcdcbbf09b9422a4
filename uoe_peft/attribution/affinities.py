"""What an attribution has found: affinities of all experts, what they were made of, and how sure they are.

Data, and questions that they answer by themselves. Files, pictures and texts are made of them by the modules above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from torch import Tensor

from uoe_peft.attribution.confidence import Confidence
from uoe_peft.attribution.expert_use import ExpertUse
from uoe_peft.attribution.scores import Gate, Score, contrast

Pair = tuple[int, int]
Strategy = Literal["all_layers", "same_layer", "each_layer"]


@dataclass(frozen=True, eq=False)
class Affinities:
    """Affinity of every expert to a forget set.

    Attributes:
        affinity: The higher, the more the expert has to do with the forget set; NaN where it was not measured. Shape
            `(L, E)`, float32.
        layer_indices: Decoder layer of each row, as in `model.layers.20`; L of them, ascending.
        score: Name of the score.
        gate: Which gate values the score was made of.
        model_name: Name or path of the model.
        model_revision: Commit of the model on the Hub, where known.
        seed: Of the sample and the resamples.
        forget: How much the forget set uses each expert; None for `score="random"`, which reads no data.
        retain: The same for the retain set, where one was given.
        confidence: How sure the affinities are; None where the score has no resamples.
        options: Further arguments of :func:`attribute_experts`, for the record.
    """

    affinity: Tensor
    layer_indices: tuple[int, ...]
    score: Score
    gate: Gate
    model_name: str = ""
    model_revision: str | None = None
    seed: int = 0
    forget: ExpertUse | None = None
    retain: ExpertUse | None = None
    confidence: Confidence | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.affinity.dim() != 2 or len(self.affinity) != len(self.layer_indices):
            raise ValueError(
                f"affinity must have one row for each of the {len(self.layer_indices)} layers, "
                f"got shape {tuple(self.affinity.shape)}"
            )

    def ranking(self) -> list[tuple[int, int, float]]:
        """All measured experts as `(layer_idx, expert_idx, affinity)`, the best first; ties by layer, then expert."""
        measured = [
            (layer_idx, expert_idx, value)
            for layer_idx, row in zip(self.layer_indices, self.affinity.tolist(), strict=True)
            for expert_idx, value in enumerate(row)
            if not math.isnan(value)
        ]
        return sorted(measured, key=lambda entry: (-entry[2], entry[0], entry[1]))

    def top(self, m: int = 1, *, strategy: Strategy = "all_layers", exclude_layers: Iterable[int] = ()) -> list[Pair]:
        """The `m` best experts as `(layer_idx, expert_idx)`, the best first.

        Args:
            m: How many, M of https://arxiv.org/abs/2411.18797.
            strategy: "all_layers": the best anywhere. "same_layer": the best of one layer, the layer whose `m` best
                have the greatest sum of affinities. "each_layer": the `m` best of every layer, layer by layer; editing
                several layers forgets what relearning brings back more slowly.
            exclude_layers: Decoder layers to leave out.

        Raises:
            ValueError: Fewer than `m` experts are measured (in one layer, but for "all_layers"); `exclude_layers` names
                a layer that was not attributed; an unknown strategy.
        """
        excluded = set(exclude_layers)
        if unknown := sorted(excluded - set(self.layer_indices)):
            raise ValueError(f"exclude_layers={unknown} were not attributed; attributed are {list(self.layer_indices)}")
        pairs = [entry for entry in self.ranking() if entry[0] not in excluded]
        match strategy:
            case "all_layers":
                best = pairs[:m]
            case "same_layer":
                best = _best_of_one_layer(pairs, m)
            case "each_layer":
                best = _best_of_each_layer(pairs, m)
            case _:
                raise ValueError(f"strategy must be 'all_layers', 'same_layer' or 'each_layer', got {strategy!r}")
        if m < 1 or len(best) < m:
            raise ValueError(f"cannot choose {m} experts by strategy {strategy!r}: use 1 to {len(best)}")
        return [(layer_idx, expert_idx) for layer_idx, expert_idx, _ in best]

    def rescored(self, score: Score, *, gate: Gate | None = None) -> Self:
        """The attribution by another score that the same pass over the data has measured; without confidence.

        Args:
            score: "gate", "token_ratio", or "contrast" where a retain set was given.
            gate: Which gate values; None: as here.

        Raises:
            ValueError: The pass did not measure it.
        """
        gate = gate or self.gate
        affinity = affinity_of(score, gate, self.forget, self.retain)
        return replace(self, affinity=affinity, score=score, gate=gate, confidence=None)

    def lift(self, pair: Pair) -> float | None:
        """How many times as much the forget set uses an expert as the retain set; None without a retain set."""
        if self.forget is None or self.retain is None:
            return None
        row, column = self._place(pair)
        forget, retain = (float(use.table(self.gate)[row, column]) for use in (self.forget, self.retain))
        return forget / retain if retain else math.inf

    def value(self, table: Tensor, pair: Pair) -> float:
        """A pair's entry in a table of shape `(L, E)` such as `affinity`, `forget.token_ratio` or `confidence.low`."""
        row, column = self._place(pair)
        return float(table[row, column])

    def _place(self, pair: Pair) -> tuple[int, int]:
        layer_idx, expert_idx = pair
        if layer_idx not in self.layer_indices or not 0 <= expert_idx < self.affinity.shape[1]:
            raise ValueError(
                f"{pair} was not attributed; layers are {list(self.layer_indices)}, "
                f"experts 0 to {self.affinity.shape[1] - 1}"
            )
        return self.layer_indices.index(layer_idx), expert_idx


def affinity_of(score: Score, gate: Gate, forget: ExpertUse | None, retain: ExpertUse | None) -> Tensor:
    """Affinities by a score that routing decisions alone give. Shape `(L, E)`.

    Raises:
        ValueError: The score needs more than that, or a set that is not there.
    """
    if forget is None:
        raise ValueError(f"score {score!r} needs the forget set's routing, which score 'random' does not read")
    match score:
        case "gate":
            return forget.table(gate)
        case "token_ratio":
            return forget.token_ratio
        case "contrast":
            if retain is None:
                raise ValueError("score 'contrast' needs retain_dataset; pass one, or use score='gate'")
            return contrast(forget.table(gate), retain.table(gate))
        case _:
            raise ValueError(f"score {score!r} is not made of routing decisions; call attribute_experts with it")


def _best_of_each_layer(ranking: Sequence[tuple[int, int, float]], m: int) -> list[tuple[int, int, float]]:
    by_layer = _by_layer(ranking)
    fewest = min((len(entries) for entries in by_layer.values()), default=0)
    # Where a layer has too few, what it has is all that can be said to be possible.
    return (
        [entry for layer in sorted(by_layer) for entry in by_layer[layer][:m]] if m <= fewest else [*ranking[:fewest]]
    )


def _by_layer(ranking: Sequence[tuple[int, int, float]]) -> dict[int, list[tuple[int, int, float]]]:
    by_layer: dict[int, list[tuple[int, int, float]]] = {}
    for entry in ranking:
        by_layer.setdefault(entry[0], []).append(entry)
    return by_layer


def _best_of_one_layer(ranking: Sequence[tuple[int, int, float]], m: int) -> list[tuple[int, int, float]]:
    by_layer = _by_layer(ranking)
    enough = [entries[:m] for entries in by_layer.values() if len(entries) >= m]
    if not enough:
        return max(by_layer.values(), key=len, default=[])
    # Of equal sums the layer that comes first in the model.
    return max(enough, key=lambda entries: (sum(value for _, _, value in entries), -entries[0][0]))
