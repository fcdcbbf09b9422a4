"""Benchmarks that were stopped go on where they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WANTED = [{"seed": seed, "part": part} for seed in (0, 1) for part in ("one", "all")]


@pytest.fixture
def runs_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from resumed import Runs  # type: ignore[import-not-found]

    return Runs


def test_what_is_there_is_not_run_again(runs_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_of(tmp_path / "new", minutes=5)
    for key in list(runs.missing(WANTED))[:3]:
        runs.keep({**key, "score": 0.5})
    again = runs_of(tmp_path / "new", minutes=5)
    assert list(again) == [{**key, "score": 0.5} for key in WANTED[:3]]
    assert list(again.missing(WANTED)) == WANTED[3:]
    lines = (tmp_path / "new" / "runs.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == list(again)
    assert capsys.readouterr().out.count("\n") == 3


def test_nothing_begins_when_time_is_over(runs_of: Any, tmp_path: Path) -> None:
    assert list(runs_of(tmp_path, minutes=0).missing(WANTED)) == []
    assert list(runs_of(tmp_path).missing(WANTED)) == WANTED
