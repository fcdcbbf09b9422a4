"""Data sets by name: files and folders here, anything else on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from uoe_peft.cli.loading import load_rows

ROWS = [{"prompt": "who?", "completion": "me"}, {"prompt": "where?", "completion": "here"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_files_give_their_rows(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.to_json(tmp_path / "a.jsonl")
    dataset.to_csv(tmp_path / "a.csv")
    for name in ("a.jsonl", "a.csv"):
        assert list(load_rows(str(tmp_path / name))) == ROWS


def test_a_folder_gives_its_rows(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    assert list(load_rows(str(tmp_path / "rows"))) == ROWS


def test_a_folder_of_splits_is_refused(tmp_path: Path) -> None:
    splits = DatasetDict({"test": Dataset.from_list(ROWS), "train": Dataset.from_list(ROWS)})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"holds several splits.*\['test', 'train'\]"):
        load_rows(str(tmp_path / "splits"))


def test_an_unknown_kind_of_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"expected a file that ends in \.json"):
        load_rows(str(tmp_path / "a.txt"))


def test_a_name_on_the_hub_carries_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> Dataset:
        asked.append((name, configuration, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("uoe_peft.cli.loading.load_dataset", load_dataset)
    load_rows("locuslab/TOFU:forget10")
    load_rows("a/b", split="test")
    assert asked == [("locuslab/TOFU", "forget10", "train"), ("a/b", None, "test")]
