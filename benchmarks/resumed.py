"""Runs that are kept as they come, so that a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Run = dict[str, Any]


class Runs(list[Run]):
    """The runs of `output_dir/runs.jsonl`, and what is added to them.

    Args:
        output_dir: Folder of the file, which is made if there is none.
        minutes: No run begins after this.
    """

    def __init__(self, output_dir: Path, *, minutes: float = math.inf) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self._path, self._until = output_dir / "runs.jsonl", time.perf_counter() + 60 * minutes
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        super().__init__(json.loads(line) for line in lines)

    def missing(self, wanted: Iterable[Run]) -> Iterator[Run]:
        """Those of the wanted runs, told by some of their entries, that are not there, as long as there is time."""
        for key in wanted:
            if any(key.items() <= run.items() for run in self):
                continue
            if time.perf_counter() > self._until:
                return
            yield key

    def keep(self, run: Run) -> None:
        """Write a run down, and print it."""
        self.append(run)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print(run, flush=True)
