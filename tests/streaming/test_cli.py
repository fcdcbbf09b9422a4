"""`--stream true` from the shell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from uoe_peft.attribution import ExpertAttribution
from uoe_peft.cli import main
from uoe_peft.cli.loading import load_model
from uoe_peft.evaluation import UnlearningReport
from uoe_peft.streaming import StreamedModel
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

BASE = str(checkpoint_path("base"))


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    other = next(topic for topic in TOPICS if topic != FORGET_TOPIC)
    options = []
    for name, topic in (("forget", FORGET_TOPIC), ("retain", other)):
        rows = load_facts([topic]).select_columns(["prompt", "completion"]).select(range(24))
        rows.save_to_disk(tmp_path / name)
        options += [f"--{name}_dataset", str(tmp_path / name)]
    return options


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
def test_attribute_gives_the_same_affinities(sets: list[str], tmp_path: Path) -> None:
    found = []
    for stream in ("true", "false"):
        path = str(tmp_path / f"{stream}.json")
        options = ["--dtype", "float32", "--stream", stream, "--output", path]
        main(["attribute", "--model_name_or_path", BASE, *sets, *options])
        found.append(ExpertAttribution.load(path).affinity)
    assert torch.equal(*found)


def test_unlearn_gives_the_same_adapter(sets: list[str], tmp_path: Path) -> None:
    found = []
    for stream in ("true", "false"):
        folder = tmp_path / stream
        options = ["--stream", stream, "--dtype", "float32", "--target_experts", "2:7", "--output_dir", str(folder)]
        training = ["--forget_loss", "rmu", "--retain_loss", "embed_diff", "--max_steps", "2", "--use_cpu", "true"]
        quiet = ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--bf16", "false"]
        main(["unlearn", "--model_name_or_path", BASE, *sets, *options, *training, *quiet])
        found.append(load_file(folder / "adapter_model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) and value.any() for name, value in found[0].items())


@pytest.mark.filterwarnings("ignore:fewer tokens of the .* set reach:UserWarning")
def test_solve_and_evaluate_say_the_same(sets: list[str], tmp_path: Path) -> None:
    adapters, scores = [], []
    for stream in ("true", "false"):
        folder = tmp_path / f"solved-{stream}"
        options = ["--stream", stream, "--dtype", "float32", "--target_experts", "2:7", "--output_dir", str(folder)]
        main(["solve", "--model_name_or_path", BASE, *sets, *options, "--keep_retain", "0.5"])
        adapters.append(load_file(folder / "adapter_model.safetensors"))
        report = tmp_path / f"report-{stream}"
        options = ["--stream", stream, "--dtype", "float32", "--max_examples", "6", "--max_new_tokens", "2"]
        main(["evaluate", "--adapter", str(tmp_path / "solved-true"), *sets, *options, "--output_dir", str(report)])
        scores.append(UnlearningReport.load(report / "report.json"))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert any(value.any() for value in adapters[0].values())
    for model in ("base", "unlearned"):
        for role in ("forget", "retain"):
            assert scores[0].scores[model][role].probability == scores[1].scores[model][role].probability
    assert any("streamed from disk: no answers were generated" in note for note in scores[0].notes)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="leave out device_map and dequantize"):
        load_model(BASE, dtype="auto", device_map="auto", stream=True)
    assert isinstance(load_model(BASE, dtype="auto", device_map=None, stream=True), StreamedModel)
