"""A report says in a file and in a table what it holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import Dataset

from uoe_peft.evaluation import AnswerScores, AttackRun, Calibration, UnlearningReport, ValueScores
from uoe_peft.evaluation.attacks import AttackResult
from uoe_peft.evaluation.evidence import LayerShift
from uoe_peft.evaluation.metrics import Interval
from uoe_peft.evaluation.report.comparison import render_comparison, side_by_side
from uoe_peft.evaluation.report.pictures import Bar, bars

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
    assert content["base"]["retain"] == {
        "rouge_l_recall": None,
        "probability": 0.75,
        "num_examples": 5,
        "metrics": {},
    }
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


HOSTILE = "<script>alert(1)</script> | x"


def scores(value: float) -> AnswerScores:
    interval = Interval(value, value - 0.125, value + 0.125)
    return AnswerScores(value, value / 2, 9, {"rouge_l_recall": interval, "probability": interval})


FULL = UnlearningReport(
    scores={
        "base": {"forget": scores(0.9), "retain": scores(0.875)},
        "unlearned": {"forget": scores(0.25), "retain": scores(0.75)},
        "calibrated": {"forget": scores(0.5), "retain": scores(0.8125)},
        "retrained": {"forget": scores(0.2), "retain": scores(0.8125)},
    },
    notes=(HOSTILE,),
    by_value=(ValueScores("retain", "topic", HOSTILE, {"base": scores(0.9), "unlearned": scores(0.7)}),),
    metrics={"base": {"model_utility": 0.75}, "unlearned": {"model_utility": 0.5, "forget_quality": 3e-9}},
    routing=tuple(
        LayerShift(name, layer, 0.75, 0.01, (1.0, 0.5, 0.5), (0.5, 1.0, 0.5), (0.2, 0.1, 0.1), (0.1, 0.3, 0.1))
        for name in ("forget", "retain")
        for layer in (2, 5)
    ),
    attacks=(
        AttackRun("unlearned", 1.0, AttackResult("int4", {"forget_rouge": 0.25}, {"forget_rouge": 0.5})),
        AttackRun("calibrated", 0.5, AttackResult("int4", {"forget_rouge": 0.5}, {"forget_rouge": 0.8})),
    ),
    calibration=Calibration(
        0.5,
        "retain",
        "retain_rouge",
        0.8,
        (
            {"scale": 0.0, "forget_rouge": 0.9, "retain_rouge": 0.9},
            {"scale": 0.5, "forget_rouge": 0.5, "retain_rouge": 0.8},
        ),
        True,
    ),
    settings={"suite": HOSTILE, "target_experts": [[5, 1]]},
    cost={"adapter_bytes": 123456.0},
    examples=Dataset.from_list(
        [
            {"set": "forget", "row": 0, "prompt": HOSTILE, "truth": "t", "columns": "{}"}
            | {f"answer_{m}": HOSTILE for m in ("base", "unlearned", "calibrated", "retrained")}
            | {f"rouge_l_recall_{m}": 0.5 for m in ("base", "unlearned", "calibrated", "retrained")}
        ]
    ),
)


class Tags(HTMLParser):
    """Open tags at the end, and every address that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_all_parts_of_a_report_survive_a_file(tmp_path: Path) -> None:
    FULL.save(tmp_path / "report.json")
    assert UnlearningReport.load(tmp_path / "report.json") == FULL
    assert UnlearningReport.load(tmp_path / "report.json") != replace(FULL, attacks=())
    (tmp_path / "other.json").write_text('{"affinity": []}')
    with pytest.raises(ValueError, match=r"is no report of an evaluation: it lacks \['base', 'notes'\]"):
        UnlearningReport.load(tmp_path / "other.json")


def test_a_verdict_says_what_was_lost_and_what_was_not() -> None:
    verdict = FULL.verdict("unlearned")
    assert (verdict.forgotten, verdict.kept) == (True, False)  # 0.25 <= 0.2 + 0.05; 0.75 < 0.95 · 0.875
    assert verdict.retain_floor == {"retain": pytest.approx(0.83125)}
    assert not FULL.verdict("base").forgotten
    assert FULL.verdict("base").kept
    assert FULL.verdict("base", forget_limit=0.95).forgotten
    with pytest.raises(ValueError, match="pass forget_limit"):
        REPORT.verdict("unlearned")
    with pytest.raises(ValueError, match="no scores of 'retrained'"):
        REPORT.verdict("retrained")


def test_the_page_is_whole_and_fetches_nothing() -> None:
    tags = Tags()
    tags.feed(FULL.html(title=HOSTILE))
    assert tags.open == []
    assert tags.fetched == []
    assert "script" not in tags.seen
    assert "svg" in tags.seen
    assert "@import" not in FULL.html()
    assert "url(" not in FULL.html()


def test_the_page_frames_the_unlearned_expert() -> None:
    (frame, *_) = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]*stroke="#f08c00"', FULL.html())
    cells = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]*><title>layer 5, expert 1: 0.1000', FULL.html())
    assert cells == [frame]


def test_tables_hold_hostile_text() -> None:
    lines = FULL.markdown().splitlines()
    rows = [line for line in lines if line.startswith("| retain | topic")]
    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 3 + len(FULL.scores)
    assert "| int4 | calibrated | 0.50 | 0.500 → 0.800 |" in lines
    assert "3.00e-09" in FULL.markdown()


def test_reports_side_by_side() -> None:
    table = side_by_side({"one": FULL, "two": replace(FULL, scores={**FULL.scores, "unlearned": FULL.scores["base"]})})
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.split("\n\n")[0].splitlines()[2:]]
    assert names == ["base", "one", "one, calibrated", "two", "two, calibrated", "retrained"]
    assert "one" in render_comparison({"one": FULL}, title="t")
    with pytest.raises(ValueError, match="only evaluations of the same suite"):
        side_by_side({"one": FULL, "two": replace(FULL, roles={"forget": "forget", "kept": "retain"})})
    with pytest.raises(ValueError, match="no reports"):
        side_by_side({})


def attacked(after: float, *, twin: float | None = None, rate: float = 2e-4) -> UnlearningReport:
    before, runs = {"forget_rouge": 0.05, "retain_rouge": 0.97}, []
    for model, value in (("unlearned", after), ("retrained", twin)):
        if value is not None:
            result = AttackResult(
                "relearning", before, {"forget_rouge": value, "retain_rouge": 0.9}, settings={"learning_rate": rate}
            )
            runs.append(AttackRun(model, 1.0, result))  # type: ignore[arg-type]
    curve = ({"scale": 1.0, **before}, {"scale": 0.0, "forget_rouge": 1.0, "retain_rouge": 1.0})
    runs.append(AttackRun("unlearned", 1.0, AttackResult("scale_sweep", before, curve[-1], curve)))
    return replace(FULL, attacks=tuple(runs))


def test_attacks_side_by_side() -> None:
    reports = {"expert": attacked(0.42, twin=0.06), "lora": attacked(0.11)}
    lines = side_by_side(reports).splitlines()
    assert "| forget / retain after | expert | lora | retrained |" in lines
    assert "| none | 0.05 / 0.97 | 0.05 / 0.97 | 0.05 / 0.97 |" in lines
    assert "| relearning | 0.42 / 0.90 | 0.11 / 0.90 | 0.06 / 0.90 |" in lines
    sweep = "scale 1: 0.05 / 0.97, scale 0: 1.00 / 1.00"
    assert f"| scale_sweep | {sweep} | {sweep} | - |" in lines
    page = render_comparison(reports, title="t")
    assert page.count("0.05 → 0.42") == 1
    assert "0.05 → 1.00" not in page  # a sweep is no bar: it ends at the base
    assert "do not compare" not in page
    unequal = side_by_side(reports | {"full": attacked(0.2, rate=1e-3)})
    assert "relearning: not the same budget for expert and full; these do not compare." in unequal


def test_the_way_of_an_attack_is_shown() -> None:
    assert "scale 1: 0.050, scale 0: 1.000" in attacked(0.4).markdown()
    assert "scale 1: 0.050, scale 0: 1.000" in attacked(0.4).html()


def test_what_stands_beside_a_bar_fits_the_picture() -> None:
    drawn = bars([("int4", [Bar(1.0, "#000", "0.04 → 0.42"), Bar(0.5, "#000", "0.50")])], title="t")
    (width,) = re.findall(r'viewBox="0 0 (\d+) ', drawn)
    labels = re.findall(r'<text x="(\d+)" y="\d+">([^<]+)<', drawn)
    assert [text for _, text in labels] == ["0.04 → 0.42", "0.50"]
    assert all(int(x) + 7 * len(text) <= int(width) for x, text in labels)  # at 12 pixels, a digit has 7
    tracks = re.findall(r'width="([\d.]+)" height="12" fill="(#eef0f3|#000)"', drawn)
    assert [float(tracks[i + 1][0]) / float(tracks[i][0]) for i in (0, 2)] == [1.0, pytest.approx(0.5, abs=0.001)]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_phone_needs_no_sideways_scrolling(tmp_path: Path) -> None:
    """In frames of a phone's width: a window of the browser itself is never so narrow."""
    reports = {"one expert of the first layer": attacked(0.42, twin=0.06), "lora": attacked(0.11)}
    pages = [FULL.html(), attacked(0.3, twin=0.1).html(), render_comparison(reports, title="t")]
    probe = (
        "<script>parent.postMessage(document.documentElement.scrollWidth + ' of ' + innerWidth, '*')</script></body>"
    )
    frames = ""
    for place, page in enumerate(pages):
        (tmp_path / f"{place}.html").write_text(page.replace("</body>", probe))
        frames += f'<iframe src="{place}.html" style="width:390px;border:0"></iframe>'
    tell = "<script>onmessage = told => document.title += told.data + ';'</script>"
    (tmp_path / "all.html").write_text(f"<html><head><title></title>{tell}</head><body>{frames}</body></html>")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--virtual-time-budget=2000", "--dump-dom"]
    shown = subprocess.run(
        [*command, f"file://{tmp_path}/all.html"], capture_output=True, text=True, timeout=120, check=True
    )
    widths = re.findall(r"(\d+) of (\d+);", shown.stdout)
    assert widths == [("390", "390")] * len(pages)
