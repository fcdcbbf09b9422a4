"""Data sets by name: files and folders here, anything else on the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedConfig, Qwen2MoeConfig

from uoe_peft.cli.loading import load_model, load_rows
from uoe_peft.testbed import checkpoint_path

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


def test_a_model_is_loaded_in_the_dtype_asked_for() -> None:
    base = str(checkpoint_path("base"))
    for dtype in ("float16", "float32"):
        assert load_model(base, dtype=dtype, device_map=None).dtype == getattr(torch, dtype)


def test_dequantize_reaches_the_quantisation_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(name: str, **options: object) -> dict[str, object]:
        return options

    monkeypatch.setattr("uoe_peft.cli.loading.AutoModelForCausalLM.from_pretrained", from_pretrained)
    save_config(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    options = load_model(str(tmp_path), dtype="bfloat16", device_map="auto", dequantize=True)
    quantization = options.pop("quantization_config")
    assert options == {"dtype": "bfloat16", "device_map": "auto"}
    assert quantization.dequantize
    assert quantization.modules_to_not_convert == ["lm_head"]
    assert "quantization_config" not in load_model(str(tmp_path), dtype="auto", device_map=None)


@pytest.mark.parametrize(
    ("stored", "form"),
    [(None, "plain weights"), ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes")],
)
def test_other_forms_cannot_be_dequantised(tmp_path: Path, stored: dict[str, object] | None, form: str) -> None:
    save_config(tmp_path, stored)
    with pytest.raises(ValueError, match=f"which is stored as {form}; leave it out"):
        load_model(str(tmp_path), dtype="auto", device_map=None, dequantize=True)


def save_config(folder: Path, quantization: dict[str, object] | None) -> None:
    config: PreTrainedConfig = Qwen2MoeConfig(num_hidden_layers=1)
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)
