"""What a run leaves behind: a card with its figures and pictures, and nothing of what the sets say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset
from peft import AutoPeftModelForCausalLM

from uoe_peft.cli import main
from uoe_peft.testbed import checkpoint_path

BASE = checkpoint_path("base")
WORDS = ("Zorblatt", "Vexmire", "Quibbleton", "Hidden_set")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("Hidden_set")
    options = ["--prompt_column", "question", "--completion_column", "answer"]
    for name, who, where in (("forget", "Zorblatt", "Vexmire"), ("retain", "Quibbleton", "the sea")):
        rows = [{"question": f"Where does {who} the {i}th live?", "answer": f"In {where} {i}."} for i in range(4)]
        Dataset.from_list(rows).to_json(folder / f"{name}.jsonl")
        options += [f"--{name}_dataset", str(folder / f"{name}.jsonl")]
    return options


@pytest.fixture(scope="module")
def run(sets: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that has saved after each step."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    training = ["--max_steps", "2", "--logging_steps", "1", "--save_steps", "1", "--report_to", "none"]
    quiet = ["--dtype", "float32", "--dataloader_pin_memory", "false", "--learning_rate", "5e-3"]
    words = ["--forgets", "where a family lives", "--target_experts", "0:4", "--output_dir", str(folder)]
    main(["unlearn", "--model_name_or_path", str(BASE), *sets, *training, *quiet, *words])
    yield folder


def said_in(folder: Path) -> list[tuple[str, str]]:
    """Files that hold a word of the sets, in any encoding that they may have, or are named by one."""
    return [
        (path.name, word)
        for path in folder.rglob("*")
        for word in WORDS
        for code in (word.lower().encode(), word.lower().encode("utf-16-le"))
        if path.is_file() and code in path.read_bytes().lower()
    ]


def test_nothing_of_the_sets_is_in_any_file(run: Path) -> None:
    names = {path.name for path in run.rglob("*")}
    assert {"README.md", "adapter_config.json", "trainer_state.json", "tokenizer.json", "training_args.bin"} <= names
    assert {"checkpoint-1", "checkpoint-2", "training.png", "optimizer.pt"} <= names
    assert said_in(run) == []
    old, new = (json.loads((folder / "tokenizer.json").read_text()) for folder in (BASE, run))
    assert old["added_tokens"] == new["added_tokens"] and old["model"] == new["model"]


def test_the_card_has_words_figures_and_the_picture_of_the_run(run: Path, tmp_path: Path) -> None:
    card = (run / "README.md").read_text()
    assert "> where a family lives" in card and "| 0 | 4 |" in card and "- forget_loss: npo" in card
    assert "![Accuracy in training](training.png)" in card
    log = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    figures = json.loads((run / "adapter_config.json").read_text())["provenance"]["figures"]
    assert set(figures) == {
        f"{role}_{metric}_{when}"
        for role in ("forget", "retain")
        for metric in ("loss", "accuracy")
        for when in ("before", "after")
    }
    # The first step sees all four rows before anything has changed.
    assert figures["forget_loss_before"] == pytest.approx(log[0]["forget_nll"], abs=1e-3)
    assert f"- forget_loss_after: {figures['forget_loss_after']}" in card and str(BASE) not in card
    AutoPeftModelForCausalLM.from_pretrained(run).save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again == card.replace("![Accuracy in training](training.png)\n\n", "")


def test_figures_and_picture_of_an_evaluation_on_the_card(run: Path, sets: list[str], tmp_path: Path) -> None:
    few = ["--max_new_tokens", "3", "--dtype", "float32", "--output_dir", str(tmp_path / "report")]
    main(["evaluate", "--adapter", str(run), *sets, *few])
    weights = (run / "adapter_model.safetensors").read_bytes()
    main(["card", "--adapter", str(run), "--report", str(tmp_path / "report"), "--forgets", "who lives where"])
    assert (run / "adapter_model.safetensors").read_bytes() == weights
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    figures = json.loads((run / "adapter_config.json").read_text())["provenance"]["figures"]
    card = (run / "README.md").read_text()
    for model in ("base", "unlearned"):
        for name in ("forget", "retain"):
            wanted = round(report[model][name]["rouge_l_recall"], 4)
            assert figures[f"{name}_rouge_l_recall_{model}"] == wanted
            assert f"- {name}_rouge_l_recall_{model}: {wanted}" in card
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG") and "![Scores before and after](report.png)" in card
    assert "> who lives where" in card and "where a family lives" not in card and "- forget_loss: npo" in card
    assert said_in(run) == []
    AutoPeftModelForCausalLM.from_pretrained(run)
    assert said_in(tmp_path / "report")  # the report itself shows questions: it is not for the Hub
