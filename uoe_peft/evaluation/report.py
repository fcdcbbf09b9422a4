"""What an evaluation found, as a value that can be printed and stored."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

ModelName = Literal["base", "unlearned", "retrained"]
SetName = Literal["forget", "retain"]


@dataclass(frozen=True)
class AnswerScores:
    """How well one model answers one set.

    Attributes:
        rouge_l_recall: Mean ROUGE-L recall of greedy answers, in [0, 1]; None where there are no prompts to answer.
        probability: Mean over examples of `exp(-CE)` on the answer's tokens, in [0, 1].
        num_examples: Examples that the means are over.
    """

    rouge_l_recall: float | None
    probability: float
    num_examples: int


@dataclass(frozen=True)
class UnlearningReport:
    """Answers of the base model, of the unlearned one and, if there is one, of a model that never saw the forget set.

    Attributes:
        scores: By model, then by set.
        notes: What a reader of the numbers must know, such as why a metric is missing.
    """

    scores: dict[ModelName, dict[SetName, AnswerScores]]
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The scores as plain values, by model, set and metric; and the notes."""
        content: dict[str, Any] = {
            model: {name: asdict(scores) for name, scores in sets.items()} for model, sets in self.scores.items()
        }
        return content | {"notes": list(self.notes)}

    def save(self, path: str | PathLike[str]) -> None:
        """Write `to_dict()` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> UnlearningReport:
        """The report that `save` wrote to `path`."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        notes = tuple(content.pop("notes"))
        scores = {
            model: {name: AnswerScores(**scores) for name, scores in sets.items()} for model, sets in content.items()
        }
        return cls(scores=scores, notes=notes)

    def summary(self) -> str:
        """A table in plain text, one row a model, followed by the notes."""
        lines = [
            f"{'':10}  {'forget':^24}  {'retain':^24}",
            f"{'':10}  {'ROUGE-L':>11} {'probability':>12}  {'ROUGE-L':>11} {'probability':>12}",
        ]
        for model, sets in self.scores.items():
            lines.append(f"{model:10}  {_cells(sets['forget'])}  {_cells(sets['retain'])}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _cells(scores: AnswerScores) -> str:
    recall = "-" if scores.rouge_l_recall is None else f"{scores.rouge_l_recall:.3f}"
    return f"{recall:>11} {scores.probability:>12.3f}"
