"""A report says in a file and in a table what it holds."""

from __future__ import annotations

import json
from pathlib import Path

from uoe_peft.evaluation import AnswerScores, UnlearningReport

REPORT = UnlearningReport(
    scores={
        "base": {"forget": AnswerScores(0.9, 0.8, 7), "retain": AnswerScores(None, 0.75, 5)},
        "unlearned": {"forget": AnswerScores(0.25, 0.125, 7), "retain": AnswerScores(None, 0.5, 5)},
    },
    notes=("retain set: text",),
)


def test_the_file_has_models_sets_and_metrics(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["base"]["retain"] == {"rouge_l_recall": None, "probability": 0.75, "num_examples": 5}
    assert content["unlearned"]["forget"]["rouge_l_recall"] == 0.25
    assert content["notes"] == ["retain set: text"]


def test_a_saved_report_loads_as_it_was(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "report.json")
    assert UnlearningReport.load(tmp_path / "report.json") == REPORT


def test_the_table_has_a_row_a_model_and_the_notes() -> None:
    lines = REPORT.summary().splitlines()
    assert lines[2].split() == ["base", "0.900", "0.800", "-", "0.750"]
    assert lines[3].split() == ["unlearned", "0.250", "0.125", "-", "0.500"]
    assert lines[4] == "note: retain set: text"
