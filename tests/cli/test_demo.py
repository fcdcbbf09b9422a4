"""The demo does what it says: forgets the topic, keeps the rest, comes off without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from uoe_peft import precision
from uoe_peft.cli import main
from uoe_peft.cli.fresh_process import reload_differs_by
from uoe_peft.cli.loading import compute_dtype
from uoe_peft.cli.stages.demo import count_other_bits
from uoe_peft.testbed import checkpoint_path


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    main(["demo", "--output_dir", str(folder), "--max_examples", "60"])
    return folder


@pytest.fixture(scope="module")
def report(output_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output_dir / "demo_report.json").read_text())
    return content


def test_the_topic_is_forgotten_and_the_rest_is_kept(report: dict[str, Any]) -> None:
    for name in ("forget", "retain"):
        assert report["base"][name]["rouge_l_recall"] > 0.95
    # Wider than what RESULTS.md reports: other processors round differently, and training magnifies it.
    assert report["unlearned"]["forget"]["rouge_l_recall"] <= report["retrained"]["forget"]["rouge_l_recall"] + 0.12
    assert report["unlearned"]["retain"]["rouge_l_recall"] >= 0.85 * report["base"]["retain"]["rouge_l_recall"]


def test_little_is_trained(report: dict[str, Any], output_dir: Path) -> None:
    assert len(report["target_experts"]) == 1
    assert report["trainable_share"] < 0.02
    assert report["adapter_bytes"] == (output_dir / "adapter" / "adapter_model.safetensors").stat().st_size
    assert report["adapter_bytes"] < 0.05 * (checkpoint_path("base") / "model.safetensors").stat().st_size


def test_the_adapter_comes_off_without_a_trace_and_loads_as_it_was(report: dict[str, Any]) -> None:
    assert report["toggle_bit_exact"] is True
    assert report["reload_max_difference"] == 0.0


@pytest.mark.parametrize("slow", [True, False])
def test_it_computes_in_bfloat16_where_that_is_quick(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "is_slow", lambda dtype, device: slow and dtype == torch.bfloat16)
    assert compute_dtype("auto") == ("float32" if slow else "bfloat16")
    assert compute_dtype("bfloat16") == "bfloat16"


def test_there_is_a_picture(output_dir: Path) -> None:
    assert (output_dir / "demo.png").stat().st_size > 10_000


def test_other_logits_than_the_saved_ones_are_noticed(output_dir: Path, tmp_path: Path) -> None:
    input_ids = torch.arange(30, 40)[None]
    vocab_size = json.loads((checkpoint_path("retrained") / "config.json").read_text())["vocab_size"]
    difference = reload_differs_by(
        checkpoint_path("retrained"),
        output_dir / "adapter",
        dtype="bfloat16",
        input_ids=input_ids,
        logits=torch.zeros(1, 10, vocab_size),
        reference=tmp_path / "reference.safetensors",
    )
    assert difference > 0


def test_bits_are_counted_entry_by_entry() -> None:
    one = torch.tensor([1.0, 0.0, float("nan"), 2.0], dtype=torch.bfloat16)
    other = torch.tensor([1.0, -0.0, float("nan"), 2.015625], dtype=torch.bfloat16)
    assert count_other_bits(one, other) == 2
    assert count_other_bits(one, one.clone()) == 0
