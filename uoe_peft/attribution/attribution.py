"""The result of an attribution, with everything that can be made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from uoe_peft.attribution import plots, storage, summary
from uoe_peft.attribution.affinities import Affinities


@dataclass(frozen=True, eq=False)
class ExpertAttribution(Affinities):
    """Affinity of every expert to a forget set.

    `ranking()`, `top(m)`, `lift(pair)` and `rescored(score)` answer questions, `summary()`, `plot(path)`, `save(path)`
    and `load(path)` show and keep it. For its attributes see :class:`Affinities`.
    """

    def metadata(self) -> dict[str, Any]:
        """What was asked, of which model and data, and how sure the answer is: plain JSON, for adapters' configs."""
        return storage.metadata(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to a JSON file that a person can read and :meth:`load` restores exactly."""
        Path(path).write_text(storage.to_json(self), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: The file is no attribution, or of a newer version of the format.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}; expected a file written by save()") from error
        return cls(**storage.from_content(content, where=str(path)))

    def summary(self, *, num_experts: int = 5) -> str:
        """The best experts and how sure they are, as a table in plain text."""
        return summary.summary(self, num_experts=num_experts)

    def plot(self, path: str | PathLike[str], *, m: int = 1) -> None:
        """Draw affinities by layer and expert with the `m` best marked, and the use of the best layer's experts.

        Args:
            path: Picture to write; the ending names the format.
            m: How many experts to mark.

        Raises:
            ImportError: matplotlib is not installed.
        """
        plots.plot(self, path, targets=self.top(m))
