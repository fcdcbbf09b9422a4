"""`attribute` and `unlearn` from the shell, on the bundled model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from uoe_peft.attribution import ExpertAttribution
from uoe_peft.cli import main
from uoe_peft.cli.attribute import AttributeArguments
from uoe_peft.cli.parsing import parse
from uoe_peft.cli.unlearn import UnlearnArguments, target_experts
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.training import UnlearningConfig
from uoe_peft.tuner import UOEConfig


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    others = [topic for topic in TOPICS if topic != FORGET_TOPIC]
    columns = ["prompt", "completion"]
    facts: dict[str, Dataset] = {"forget": load_facts([FORGET_TOPIC]), "retain": load_facts(others[:1])}
    options = []
    for name, rows in facts.items():
        rows.select_columns(columns).save_to_disk(tmp_path / name)
        options += [f"--{name}_dataset", str(tmp_path / name)]
    return options


def test_attribute_writes_a_ranking_that_loads(
    sets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "attribution.json"
    base = str(checkpoint_path("base"))
    main(["attribute", "--model_name_or_path", base, *sets, "--output", str(path), "--top", "2"])
    attribution = ExpertAttribution.load(path)
    assert attribution.score == "gate"
    assert attribution.retain is not None
    (layer_idx, expert_idx) = attribution.top(1)[0]
    assert f"layer {layer_idx:3}  expert {expert_idx:3}" in capsys.readouterr().out.splitlines()[0]


def test_unlearn_writes_an_adapter_that_loads(sets: list[str], tmp_path: Path) -> None:
    base = str(checkpoint_path("base"))
    edited = ["--target_experts", "2:7", "0:3", "--delta_type", "low_rank", "--r", "5"]
    training = [
        "--output_dir",
        str(tmp_path / "adapter"),
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "3",
        "--learning_rate",
        "1e-2",
    ]
    quiet = [
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--save_strategy",
        "no",
        "--dataloader_pin_memory",
        "false",
    ]
    main(["unlearn", "--model_name_or_path", base, *sets, *edited, *training, *quiet])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    config = model.active_peft_config
    assert isinstance(config, UOEConfig)
    assert (config.target_experts, config.delta_type, config.r) == ([(0, 3), (2, 7)], "low_rank", 5)
    ids = torch.arange(40, 60)[None]
    with torch.inference_mode():
        unlearned = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids).logits, unlearned)


def test_targets_are_written_as_pairs() -> None:
    assert target_experts(["auto"]) == "auto"
    assert target_experts(["20:37", "3:5"]) == [(20, 37), (3, 5)]


@pytest.mark.parametrize("words", [["20"], ["20:"], ["auto", "1:2"], ["a:b"], ["1:-2"]])
def test_other_targets_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="must be pairs layer:expert such as 20:37, or auto, got"):
        target_experts(words)


@pytest.mark.parametrize(
    ("name", "groups"),
    [("attribute", (AttributeArguments,)), ("unlearn", (UnlearnArguments, UnlearningConfig))],
)
def test_the_example_files_hold_known_options(name: str, groups: tuple[type, ...]) -> None:
    path = Path(__file__).parents[2] / "examples" / f"{name}.yaml"
    options = parse(name, ["--config", str(path)], *groups)[0]
    assert options.model_name_or_path == "Qwen/Qwen1.5-MoE-A2.7B-Chat"
    if isinstance(options, UnlearnArguments):
        assert target_experts(options.target_experts) == "auto"
