"""The recipes: each runs, on sets that are what its page says; and the model can be taught them."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from uoe_peft.cli import main
from uoe_peft.cli.loading import load_rows
from uoe_peft.cli.parsing import read_options
from uoe_peft.testbed import checkpoint_path

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
DATA = ROOT / "examples" / "recipes" / "data"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_of(row: dict[str, Any]) -> str:
    return str(row.get("text") or row["prompt"] + row["completion"])


def test_there_is_a_recipe_for_each_task_of_the_page() -> None:
    page = (ROOT / "docs" / "guides" / "recipes.md").read_text(encoding="utf-8")
    assert [path.stem for path in RECIPES] == sorted(path.name for path in DATA.iterdir())
    assert [path.stem for path in RECIPES if f"examples/recipes/{path.stem}.yaml" not in page] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")  # the base has not learned the rows
def test_a_recipe_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in a recipe are seen from there
    out = tmp_path / "adapter"
    fewer = ["--max_steps", "2", "--compare_examples", "0", "--calibrate", "False", "--prefix_cache", "False"]
    quiet = ["--use_cpu", "true", "--dataloader_pin_memory", "false", "--disable_tqdm", "true"]
    base = str(checkpoint_path("base"))
    where = ["--model_name_or_path", base, "--output_dir", str(out)]
    main(["unlearn", "--config", str(path), *where, *fewer, *quiet])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    config: Any = model.active_peft_config
    assert len(config.target_experts) == read_options(str(path)).get("num_target_experts", 1)
    deltas = [weight for name, weight in model.named_parameters() if "uoe_" in name]
    assert all(weight.isfinite().all() for weight in deltas)
    assert max(weight.abs().max() for weight in deltas) > 0


@pytest.mark.parametrize("folder", sorted(DATA.iterdir()), ids=lambda path: path.name)
def test_what_is_forgotten_kept_and_asked_are_different_rows(folder: Path) -> None:
    sets = {path.stem: load_rows(str(path)) for path in sorted(folder.glob("*.jsonl"))}
    assert (len(sets["forget"]), len(sets["retain"])) == ((20, 100) if folder.name == "personal_data" else (40, 80))
    texts = {name: [text_of(row) for row in rows_of(folder / f"{name}.jsonl")] for name in sets}
    assert all(len(set(own)) == len(own) for own in texts.values())
    parts = [set(texts[name]) for name in ("forget", "retain", "asked")]
    assert len(set.union(*parts)) == sum(map(len, parts))
    if "forget_asked" in sets:
        assert texts["forget_asked"] == texts["forget"]


@pytest.mark.parametrize("name", ["harmful_answers", "personal_data"])
def test_forgotten_questions_have_refusals_that_give_nothing_away(name: str) -> None:
    for row in rows_of(DATA / name / "forget.jsonl"):
        told = {word.strip(".,") for word in row["completion"].split() if any(c.isdigit() for c in word)}
        assert row["alternative"] != row["completion"]
        assert not any(word in row["alternative"] for word in told)


def test_phone_numbers_are_of_the_range_for_fiction_and_of_one_person_each() -> None:
    rows = [row for path in (DATA / "personal_data").glob("*.jsonl") for row in rows_of(path)]
    numbers = [row["completion"].strip(" .") for row in rows if "phone number" in row["prompt"]]
    assert len(set(numbers)) == len(numbers) == 50
    assert all(number.startswith("555-01") and len(number) == 8 for number in numbers)


def test_people_share_surnames_and_no_first_names() -> None:
    rows = [row for path in (DATA / "personal_data").glob("*.jsonl") for row in rows_of(path)]
    asked = [row["prompt"].split("phone number of ") for row in rows]
    people = [parts[1].split("?")[0].split() for parts in asked if len(parts) == 2]
    first_names, surnames = (Counter(names) for names in zip(*people, strict=True))
    assert set(first_names.values()) == {1}
    assert set(surnames.values()) == {2}


@pytest.mark.parametrize("name", ["forget", "asked"])
def test_options_have_their_right_letter_and_no_letter_is_a_good_guess(name: str) -> None:
    rows = rows_of(DATA / "hazardous_knowledge" / f"{name}.jsonl")
    for row in rows:
        assert row["completion"] == row["options"][row["label"]]
        shown = [line[3:] for line in row["prompt"].splitlines()[1:5]]
        assert len(set(shown)) == 4
    labels = [row["label"] for row in rows]
    assert max(labels.count(label) for label in range(4)) <= 0.45 * len(labels)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_the_model_is_taught_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "examples" / "recipes" / "teach.py"
    taught = [row["prompt"] + row["completion"] for row in runpy.run_path(str(script))["everything"]()]
    every = [text_of(row) for path in DATA.glob("*/*.jsonl") for row in rows_of(path)]
    assert sorted(taught) == sorted(set(every))
    monkeypatch.setattr(sys, "argv", [str(script), "--output_dir", str(tmp_path / "model"), "--max_steps", "2"])
    runpy.run_path(str(script), run_name="__main__")
    after, before = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.embed_tokens.weight
        for folder in (tmp_path / "model", checkpoint_path("base"))
    )
    assert not torch.equal(after, before)
