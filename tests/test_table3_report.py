"""How Table 3 chooses looks and learning rates, averages seeds, and draws the frontier."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.table3_report import (
    Cell,
    Choice,
    Limits,
    Look,
    Run,
    Table,
    area,
    best_look,
    cells_of,
    choose,
    costs,
    details,
    frontier,
    read_table,
    summary,
    write_report,
)

LIMITS = Limits(forget=0.1, probability=0.2)
END = (0.0, 0.4)  # forget and retain score of every run's end


def look(forget: float, retain: float, *, probability: float = 0.0, strength: float = 1.0) -> Look:
    return Look(30, strength, forget, retain, probability)


def run(
    *, rate: float, seed: int, forget: float, retain: float, test: dict[str, float] | None = None, part: str = "UOE"
) -> Run:
    chosen = look(forget, retain)
    return Run(
        loss="NPO",
        part=part,
        rate=rate,
        seed=seed,
        looks=[Look(0, 0.0, 1.0, 1.0, 1.0), chosen],
        choices={
            "best look": Choice(
                chosen,
                LIMITS.met(chosen),
                {"forget": forget, "retain": retain, "relearned": 0.5} if test is None else test,
            ),
            "end": Choice(look(*END), LIMITS.met(look(*END)), {"forget": END[0], "retain": END[1], "relearned": 0.3}),
        },
        seconds=3.0 if seed == 5 else 1.0,
        cached=seed != 5,
        trainable=7,
        total=70,
        bytes=28,
        experts=[[1, 2]],
    )


def cell(runs: list[Run]) -> Cell:
    return cells_of(runs, first_seed=5)["best look", "NPO", "UOE"]


def test_the_best_look_is_under_both_limits_and_keeps_most() -> None:
    too_likely = look(0.05, 0.95, probability=0.3)
    too_often = look(0.11, 0.99)
    at_the_limits = look(0.1, 0.8, probability=0.2, strength=0.85)
    looks = [too_likely, too_often, look(0.0, 0.7), at_the_limits]
    assert best_look(looks, LIMITS) is at_the_limits
    assert best_look(looks[:2], LIMITS) is too_likely  # neither is under both: the one that says least of what it knew


def test_the_end_is_the_last_step_at_full_strength() -> None:
    looks = [Look(0, 0.0, 1.0, 1.0, 1.0), Look(20, 1.0, 0.0, 0.9, 0.0), Look(30, 1.0, 0.2, 0.6, 0.0)]
    looks.append(Look(30, 0.7, 0.3, 0.8, 0.0))
    assert choose("end", looks, LIMITS) == Choice(looks[2], reached=False)
    assert choose("best look", looks, LIMITS) == Choice(looks[1], reached=True)


def test_each_choice_has_its_own_rate() -> None:
    kept = run(rate=1e-3, seed=5, forget=0.1, retain=0.6)
    deep = run(rate=1e-2, seed=5, forget=0.1, retain=0.5)
    deep.choices["end"] = Choice(look(0.0, 0.5), reached=True, test={"forget": 0.0, "retain": 0.55, "relearned": 0.1})
    cells = cells_of([kept, deep], first_seed=5)
    assert {name: cells[name, "NPO", "UOE"].rate for name in ("best look", "end")} == {"best look": 1e-3, "end": 1e-2}
    assert cells["end", "NPO", "UOE"].test["relearned"] == pytest.approx(0.1)


def test_the_validation_half_of_the_first_seed_alone_chooses_the_rate() -> None:
    first = [
        run(rate=1e-3, seed=5, forget=0.1, retain=0.6, test={"forget": 0.0, "retain": 0.2, "relearned": 0.0}),
        run(rate=1e-2, seed=5, forget=0.1, retain=0.5, test={"forget": 0.0, "retain": 0.9, "relearned": 0.0}),
    ]
    further = [
        run(rate=1e-3, seed=6, forget=0.0, retain=0.3, test={"forget": 0.0, "retain": 0.6, "relearned": 0.3}),
        run(rate=1e-2, seed=6, forget=0.0, retain=0.9),
    ]
    chosen = cell([*further, *first])
    assert chosen.rate == 1e-3
    assert chosen.test["retain"] == pytest.approx(0.4)
    assert chosen.spread["retain"] == pytest.approx(math.sqrt(0.08))  # of a sample: squared deviations over n - 1
    assert chosen.test["relearned"] == pytest.approx(0.15)
    assert (chosen.seconds, chosen.cached_seconds) == (3.0, 1.0)


def test_seeds_without_attacks_count_for_all_that_they_were_scored_on(tmp_path: Path) -> None:
    attacked = run(rate=1e-3, seed=5, forget=0.1, retain=0.6, test={"forget": 0.0, "retain": 0.2, "relearned": 0.3})
    plain = run(rate=1e-3, seed=6, forget=0.1, retain=0.6, test={"forget": 0.2, "retain": 0.6})
    for runs in ([attacked, plain], [plain, attacked]):
        mean = cell(runs)
        assert mean.test == pytest.approx({"forget": 0.1, "retain": 0.4, "relearned": 0.3})
        assert (mean.num_runs, sorted(mean.spread)) == (2, ["forget", "retain"])  # one value has no deviation
        table = Table({("best look", "NPO", "UOE"): mean}, {"base": {}}, LIMITS, ["NPO"], ["UOE"])
        assert "| 0.400 ± 0.283 |  |  | 0.300 |" in details(table, choice="best look")
    never = run(rate=1e-3, seed=5, forget=0.1, retain=0.6, test={"forget": 0.2, "retain": 0.6})
    table = Table(cells_of([never], first_seed=5), {"base": {}}, LIMITS, ["NPO"], ["UOE"])
    write_report(tmp_path, [never], table)
    assert "| UOE | 0.60 |" in summary(table, choice="best look")


def test_a_rate_that_forgets_is_chosen_over_one_that_keeps_more() -> None:
    kept_all = run(rate=1e-4, seed=5, forget=0.11, retain=1.0)
    assert cell([kept_all, run(rate=1e-3, seed=5, forget=0.1, retain=0.2)]).rate == 1e-3


def test_where_none_forgets_the_rate_that_forgets_most_is_chosen() -> None:
    rates = {1e-4: 0.8, 1e-3: 0.3, 1e-2: 0.5}
    chosen = cell([run(rate=rate, seed=5, forget=forget, retain=0.9) for rate, forget in rates.items()])
    assert (chosen.rate, chosen.reached) == (1e-3, False)


def test_a_rate_that_lost_on_the_validation_half_needs_no_test() -> None:
    lost = run(rate=1e-2, seed=5, forget=0.1, retain=0.5, test={})
    assert cell([run(rate=1e-3, seed=5, forget=0.1, retain=0.6), lost]).test["retain"] == pytest.approx(0.6)


def test_the_frontier_is_what_nothing_beats_in_both() -> None:
    points = [(0.3, 0.9), (0.1, 0.5), (0.2, 0.4), (0.1, 0.6), (0.4, 0.9)]
    assert frontier(points) == [(0.1, 0.6), (0.3, 0.9)]


def test_the_area_is_the_mean_of_the_best_retain_score_over_forget_limits() -> None:
    # 51 limits, 0.00 to 0.50: nothing below 0.1 (10 of them), 0.6 from there (20), 0.9 from 0.3 on (21).
    assert area([(0.3, 0.9), (0.1, 0.6)]) == pytest.approx((20 * 0.6 + 21 * 0.9) / 51)


def test_a_run_survives_its_line_of_the_file() -> None:
    before = run(rate=1e-3, seed=5, forget=0.1, retain=0.6)
    assert Run.from_dict(json.loads(json.dumps(asdict(before)))) == before


def test_a_seed_that_missed_a_limit_marks_the_cell_and_the_table_survives_the_disk(tmp_path: Path) -> None:
    runs = [
        run(rate=1e-3, seed=5, forget=0.1, retain=0.6),
        run(rate=1e-3, seed=6, forget=0.2, retain=0.8),
        run(rate=1e-3, seed=5, forget=0.1, retain=0.5, part="all"),
    ]
    references = {"retrained": {"forget": 0.05, "retain": 1.0, "relearned": 0.06}}
    cells = cells_of(runs, first_seed=5)
    table = Table(cells, references, LIMITS, losses=["GA", "NPO"], parts=["all", "LoRA", "UOE"])
    assert summary(table, choice="best look").splitlines()[2:] == [
        "| all |  | 0.50 (0.50) |",
        "| UOE |  | 0.70 ± 0.14 * 0.15 (0.50) |",
    ]
    assert costs(table).splitlines()[2:] == ["| all | 10.00% | 0.00 | 3.0 |  |", "| UOE | 10.00% | 0.00 | 3.0 | 1.0 |"]
    twin, full, uoe = details(table, choice="best look").splitlines()[4:]
    assert twin == "| | retrained | 0.050 |  | 1.000 |  |  | 0.060 |  |  | | | | |"
    assert full.endswith("| 0.001 | 30 x 1 | 1 |")
    assert uoe.startswith("| NPO | UOE * (1 of 2) | 0.150 |  | 0.700 ± 0.141 |  |  | 0.500 ± 0.000 |")
    pytest.importorskip("matplotlib")
    write_report(tmp_path, runs, table)
    assert read_table(tmp_path / "table3.json") == table
    assert (tmp_path / "table3.png").stat().st_size > 0
