"""How Table 3 chooses learning rates and averages seeds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.table3_report import Cell, Run, Table, cells_of, read_table, summary, write_report


def run(*, rate: float, seed: int, forget: float, retain: float, part: str = "UOE", seconds: float = 3.0) -> Run:
    return Run(
        loss="NPO",
        part=part,
        rate=rate,
        seed=seed,
        forget=forget,
        retain=retain,
        reached=forget <= 0.1,
        steps=20,
        seconds=seconds,
        trainable=7,
        total=70,
        bytes=28,
        experts=[],
        curve=[],
    )


def cell(runs: list[Run]) -> Cell:
    return cells_of(runs, first_seed=5)["NPO", "UOE"]


def test_the_first_seed_alone_chooses_the_rate() -> None:
    first = [run(rate=1e-3, seed=5, forget=0.1, retain=0.6), run(rate=1e-2, seed=5, forget=0.1, retain=0.5)]
    further = [run(rate=1e-3, seed=6, forget=0.0, retain=0.2), run(rate=1e-2, seed=6, forget=0.0, retain=0.9)]
    chosen = cell([*further, *first])
    assert chosen.rate == 1e-3
    assert chosen.retain == pytest.approx(0.4)
    assert chosen.spread == pytest.approx(math.sqrt(0.08))  # of a sample: squared deviations over n - 1


@pytest.mark.parametrize("forget", [0.11, math.nan])
def test_a_rate_that_forgets_is_chosen_over_one_that_does_not(forget: float) -> None:
    kept_all = run(rate=1e-4, seed=5, forget=forget, retain=1.0)
    assert cell([kept_all, run(rate=1e-3, seed=5, forget=0.1, retain=0.2)]).rate == 1e-3


def test_where_none_forgets_the_rate_that_forgets_most_is_chosen_and_none_that_diverged() -> None:
    rates = {1e-4: 0.8, 1e-3: 0.3, 1e-2: math.nan}
    chosen = cell([run(rate=rate, seed=5, forget=forget, retain=0.9) for rate, forget in rates.items()])
    assert (chosen.rate, chosen.reached) == (1e-3, False)


def test_a_seed_that_did_not_forget_marks_the_cell_with_its_forget_score_and_the_table_survives_the_disk(
    tmp_path: Path,
) -> None:
    runs = [
        run(rate=1e-3, seed=5, forget=0.1, retain=0.6),
        run(rate=1e-3, seed=6, forget=0.2, retain=0.8),
        run(rate=1e-3, seed=5, forget=0.1, retain=0.5, part="all", seconds=6.0),
    ]
    references = {"base": {"forget": 1.0, "retain": 1.0}}
    table = Table(cells_of(runs, first_seed=5), references, target=0.1, losses=["GA", "NPO"], parts=["all", "UOE"])
    assert summary(table).splitlines()[2:] == [
        "| all |  | 0.50 | 10.00% | 0.00 | 1.00 | 1.00 |",
        "| UOE |  | 0.70 ± 0.14 * (0.15) | 10.00% | 0.00 | 0.50 | 0.50 |",
    ]
    pytest.importorskip("matplotlib")
    write_report(tmp_path, runs, table)
    assert read_table(tmp_path / "table3.json") == table
    assert (tmp_path / "table3.png").stat().st_size > 0
