"""The ground of linked facts: what training may read, what is asked, and what a twin never sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def linked() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import linked as script

        yield script


@pytest.fixture(scope="module")
def ground(linked: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return linked.LinkedGround(tmp_path_factory.mktemp("linked"), seed=1, epochs=2)


def key(row: Any) -> tuple[Any, ...]:
    return (row["domain"], *row["edge"], row["kind"])


def test_what_is_forgotten_is_all_asked_and_of_the_rest_the_half_that_training_does_not_read(
    linked: ModuleType, ground: Any
) -> None:
    for request, num_edges in (("hub edge", 1), ("rim edge", 1), ("hub node", 6)):
        forget, kept = ground.split(request)
        assert len(forget) == 6 * num_edges
        assert {row["domain"] for row in forget} == {"companies"}
        assert not set(map(key, forget)) & set(map(key, kept))
        assert len(forget) + len(kept) == len(ground.facts) == 2 * 19 * 6
        asked = Counter(key(row)[:3] for row in ground.asked(request))
        assert {asked.pop(key(row)[:3], 6) for row in forget} == {6}
        assert set(asked.values()) == {3}
        read = {key(row) for row in kept if linked.in_training(row)}
        assert not read & set(map(key, ground.asked(request)))


def test_groups_are_distances(linked: ModuleType, ground: Any) -> None:
    near = linked.hops(ground.graph, linked.requested(ground.graph, "rim edge"))
    for row in ground.facts:
        own, group = near[tuple(row["edge"])], ground.group(row, "rim edge")
        if row["domain"] == "people":
            assert group == "other domain"
        else:
            words = {0: "forgotten", 1: "1 edge away", 2: "2 edges away", None: "no path"}
            assert group == words.get(own, "3 or more")


def test_scores_are_means_of_each_group(linked: ModuleType, ground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows nothing but the contracts that no path leads to."""
    answers = [
        row["completion"].strip() if ground.group(row, "hub edge") == "no path" else "Zzz"
        for row in ground.asked("hub edge")
    ]
    monkeypatch.setattr(linked, "greedy_answers", lambda *args, **options: answers)
    assert ground.scores(None, "hub edge") == {
        group: float(group == "no path") for group in linked.GROUPS if group != "3 or more"
    }


def test_a_model_is_trained_on_each_fact_once_a_pass_and_its_rate_ends_low(
    linked: ModuleType, ground: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, seen = [], []
    set_rate = linked.set_rate

    def rated(optimizer: Any, step: int, steps: int, *, peak: float) -> None:
        rates.append(step / steps)
        set_rate(optimizer, step, steps, peak=peak)

    def read(model: Any, optimizer: Any, batch: Any) -> float:
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        seen.extend(ground.tokenizer.decode(ids[mask.bool()]) for ids, mask in rows)
        return 0.0

    monkeypatch.setattr(linked, "set_rate", rated)
    monkeypatch.setattr(linked, "train_step", read)
    facts, unknown = ground.facts[:13], ground.unknown[:40]
    linked.taught(facts, unknown, ground.tokenizer, epochs=2, seed=0)
    assert rates == [step / 6 for step in range(6)]  # 13 facts and 6 unknown links, 8 a step
    for first in (0, 19):
        counts = Counter(text.removesuffix("<|endoftext|>") for text in seen[first : first + 19])
        ways = [[prompt + row["completion"] for prompt in row["phrasings"]] for row in facts]
        assert [sum(counts[way] for way in own) for own in ways] == [1] * 13
        assert sum(counts[p + row["completion"]] for row in unknown for p in row["phrasings"]) == 6


def test_a_twin_is_taught_all_but_what_is_requested(
    linked: ModuleType, ground: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def taught(facts: Any, unknown: Any, tokenizer: Any, **options: Any) -> Any:
        told.append((facts, unknown, options))
        raise StopIteration

    monkeypatch.setattr(linked, "taught", taught)
    for request in (None, *get_args(linked.Request)):
        with pytest.raises(StopIteration):
            ground.load(request)
    assert [len(facts) for facts, *_ in told] == [228, 222, 222, 192]
    gone = {tuple(row["edge"]) for row in ground.split("hub node")[0]}
    facts, unknown, _ = told[3]
    assert not gone & {tuple(row["edge"]) for row in facts if row["domain"] == "companies"}
    assert not gone & {tuple(row["edge"]) for row in unknown}  # nor does it learn to decline them
    assert {options["epochs"] for *_, options in told} == {2}


def test_words_that_are_no_options_are_refused(linked: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"--kept takes \['all', 'far', 'hidden states'\], got \['near'\]"):
        list(linked.wanted(linked.LinkedArguments(kept=["near"])))


def test_references_are_in_every_table_and_empty_groups_stay_empty(linked: ModuleType) -> None:
    runs = [
        {"seed": seed, "request": "hub edge", "kept": kept, "part": part, "scores": {"forgotten": score}}
        | ({"seconds": 7} if part == "LoRA" else {})
        for seed, kept, part, score in ((0, "all", "base", 1.0), (0, "far", "LoRA", 0.25), (1, "far", "LoRA", 0.35))
    ]
    every, far = linked.tables(runs)
    assert "LoRA" not in every
    assert far.splitlines()[4:] == ["| base | 1.00 |  |  |  |  |  |  | 1 |", "| LoRA | 0.30 |  |  |  |  |  | 7 | 2 |"]
