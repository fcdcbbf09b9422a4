"""What the benchmark of many requests asks for, keeps and asks, on a ground of authors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from uoe_peft.testbed import checkpoint_path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def script(benchmarks: None) -> ModuleType:
    import requests_ground

    return requests_ground


def numbered(kind: str, number: int) -> list[dict[str, str]]:
    return [{"prompt": f"{kind} {place}?", "completion": f" {place}."} for place in range(number)]


@pytest.fixture(scope="module")
def ground(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three authors to forget, and 450 rows of others; a tokenizer, and no model."""
    folder = tmp_path_factory.mktemp("ground")
    AutoTokenizer.from_pretrained(checkpoint_path("base")).save_pretrained(folder / "base")
    for name, rows in {"forget": numbered("forget", 60), "retain": numbered("retain", 450)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return script.Ground(folder / "out", script.Recipe(), folder)


def test_each_author_of_a_ground_is_a_request_of_twenty_rows(ground: Any) -> None:
    assert ground.names == ("author 1", "author 2", "author 3")
    for place, rows in enumerate(ground.requests.values()):
        assert rows["prompt"] == [f"forget {row}?" for row in range(20 * place, 20 * place + 20)]


def test_half_of_an_author_is_asked_and_what_is_kept_is_asked_on_other_rows_than_training_reads(ground: Any) -> None:
    for name, rows in ground.requests.items():
        assert len(ground.asked[name]) == 10
        assert set(ground.asked[name]["prompt"]) < set(rows["prompt"])
    parts = [set(rows["prompt"]) for rows in (ground.retain, ground.chosen_on, ground.asked["retain"])]
    assert [len(part) for part in parts] == [225, 80, 120]
    assert len(set.union(*parts)) == 225 + 80 + 120
    kept = ground.kept(after=0)  # the retain set, and the authors to come
    assert len(kept) == 225 + 40


def test_areas_tell_each_request_from_all_else_and_any_from_none(ground: Any) -> None:
    import requests_combining as combining

    class Gate:
        """Reads the author from the question, but takes one question of the second author for the first one's."""

        adapters = ground.names
        mistaken = str(ground.asked["author 2"]["prompt"][0])

        def scores(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.tensor(
                [self.score(text) for text in ground.tokenizer.batch_decode(input_ids, skip_special_tokens=True)]
            )

        def score(self, text: str) -> list[float]:
            if text == self.mistaken:
                return [2.0, -1.0, -1.0]
            kind, number = text.rstrip("?").split()
            return [1.0 if kind == "forget" and int(number) // 20 == place else -1.0 for place in range(3)]

        def choose(self, model: Any, **inputs: torch.Tensor) -> list[str]:
            best, place = self.scores(model, **inputs).max(dim=1)
            return [self.adapters[i] if b > 0 else "__base__" for b, i in zip(best, place, strict=True)]

    found = combining._choices(ground, None, Gate())  # type: ignore[arg-type]
    assert found["author 2"] == 0.9
    assert [found[name] for name in ("author 1", "author 3", "retain")] == [1.0, 1.0, 1.0]
    assert found["area"] == 1.0  # whichever it is taken for, it is taken for one of them
    # Of author 1: 10 right ones with 1.0; the stranger with 2.0 is above all of them, of 140 others.
    assert found["areas"]["author 1"] == pytest.approx(1 - 1 / 140, abs=1e-4)
    # Of author 2: 9 of 10 above all 140 others; the tenth ties with all of them, and a tie counts a half.
    assert found["areas"]["author 2"] == pytest.approx((9 + 0.5) / 10, abs=1e-4)
