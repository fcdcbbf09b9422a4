"""`attribute` and `unlearn` from the shell, on the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, GptOssForCausalLM

from uoe_peft.attribution import ExpertAttribution
from uoe_peft.cli import main
from uoe_peft.cli.parsing import parse
from uoe_peft.cli.stages.attribute import AttributeArguments
from uoe_peft.cli.stages.unlearn import UnlearnArguments, target_experts
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


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")  # one retain topic, two phrasings
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
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["1", str(layer_idx), str(expert_idx)]  # below the title and the headings
    assert lines[-1] == f"next: uoe-peft unlearn --target_experts {layer_idx}:{expert_idx}"


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


EXAMPLES = Path(__file__).parents[2] / "examples"
PAPER = sorted((EXAMPLES / "paper").glob("*.yaml"))


def parse_example(path: Path) -> tuple[Any, ...]:
    """The options of an example; its first line says how it is called."""
    _, command, stage, option, name = path.read_text().splitlines()[0].split()
    assert (command, option, EXAMPLES.parent / name) == ("uoe-peft", "--config", path)
    groups = {"attribute": (AttributeArguments,), "unlearn": (UnlearnArguments, UnlearningConfig)}
    return parse(stage, ["--config", str(path)], *groups[stage])


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_examples_hold_known_options(path: Path) -> None:
    options = parse_example(path)[0]
    if isinstance(options, UnlearnArguments):
        assert target_experts(options.target_experts) == "auto"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_examples_of_the_paper_have_its_settings(path: Path) -> None:
    options, training = parse_example(path)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16
    assert (training.learning_rate, training.anchor_weight) == (1e-4, 1)
    assert (options.delta_type, options.train_router) == ("full", True)
    assert options.dequantize == ("gpt-oss" in options.model_name_or_path)
    if training.forget_loss == "npo":
        assert (training.beta, training.retain_loss, training.retain_weight) == (0.001, "nll", 1)
    else:
        assert (training.forget_loss, training.retain_loss, training.retain_weight) == ("rmu", "embed_diff", 1200)
        assert training.rmu_coefficient == (8000 if "Qwen" in options.model_name_or_path else 32000)


def test_there_is_an_example_for_each_model() -> None:
    models = {path.stem.rpartition("-")[0] for path in PAPER}
    assert models == {"qwen1.5-moe", "deepseek-v2-lite", "mixtral-8x7b", "gpt-oss-20b"}


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.summary.GeneralistExpertWarning")  # so it is there
@pytest.mark.parametrize("name", ["qwen1.5-moe-rmu", "gpt-oss-20b-npo"])
def test_an_example_runs_on_another_model(name: str, sets: list[str], tmp_path: Path) -> None:
    model, adapter = str(checkpoint_path("base")), tmp_path / "adapter"
    targets: list[str] = []
    if name.startswith("gpt-oss"):
        model, targets = str(tmp_path / "model"), ["--target_experts", "1:2"]  # it is random: attribution would warn
        save_mxfp4_model(Path(model))
    changed = [*targets, "--model_name_or_path", model, *sets, "--output_dir", str(adapter), "--max_steps", "1"]
    quiet = ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
    small = ["--device_map", "cpu", "--use_cpu", "true", "--dataloader_pin_memory", "false"]
    main(["unlearn", "--config", str(EXAMPLES / "paper" / f"{name}.yaml"), *changed, *quiet, *small])
    weights = load_file(adapter / "adapter_model.safetensors")
    assert weights
    assert all(weight.isfinite().all() and weight.any() for weight in weights.values())


def save_mxfp4_model(folder: Path) -> None:
    """A tiny random gpt-oss as its checkpoints are: experts in blocks of 32 four-bit numbers, each with its scale."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
    tokenizer.save_pretrained(folder)
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, size_in, size_out = weights.pop(name).shape
        blocks = (experts, size_out, size_in // 32)
        weights[f"{name}_blocks"] = torch.randint(256, (*blocks, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(118, 122, blocks, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(stored))


def test_one_value_of_a_column_is_forgotten_alone(tmp_path: Path) -> None:
    """Its rows, picked by hand into a file of their own, give the same adapter bit for bit."""
    rows = load_facts(["potions", "towns"]).select_columns(["prompt", "completion", "topic"])
    rows = rows.select(
        [place for pair in zip(range(6), range(len(rows) - 6, len(rows)), strict=True) for place in pair]
    )
    rows.to_json(tmp_path / "both.jsonl")
    own = [row for row in rows if row["topic"] == "towns"]
    assert len(own) == 6
    Dataset.from_list(own).to_json(tmp_path / "towns.jsonl")
    options = {
        "target_experts": "3:1",
        "retain_loss": "none",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "compare_examples": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    train = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    base = ["unlearn", "--model_name_or_path", str(checkpoint_path("base")), *train]
    split = ["--split_column", "topic", "--split_value", "towns"]
    main([*base, "--forget_dataset", str(tmp_path / "both.jsonl"), *split, "--output_dir", str(tmp_path / "split")])
    main([*base, "--forget_dataset", str(tmp_path / "towns.jsonl"), "--output_dir", str(tmp_path / "own")])
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("split", "own"))
    assert found.keys() == expected.keys() and any(bool(tensor.any()) for tensor in found.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (["--split_column", "topic"], "must be one of the values of 'topic', .*'potions', 'towns'.*, got None"),
        (["--split_column", "topic", "--split_value", "tow"], "got 'tow'; each is trained by a command of its own"),
        (["--split_value", "towns"], "--split_value needs --split_column"),
        (["--split_column", "subjects", "--split_value", "towns"], "no column 'subjects' to split by"),
    ],
)
def test_a_split_that_cannot_be_is_said_before_the_model_is_read(
    tmp_path: Path, split: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = load_facts(["potions", "towns"]).select_columns(["prompt", "completion", "topic"])
    rows.to_json(tmp_path / "both.jsonl")
    arguments = ["unlearn", "--model_name_or_path", str(tmp_path / "absent"), "--retain_loss", "none", *split]
    with pytest.raises(SystemExit) as refused:
        main([*arguments, "--forget_dataset", str(tmp_path / "both.jsonl"), "--output_dir", str(tmp_path / "out")])
    said = f"{refused.value} {capsys.readouterr().err}"
    assert re.search(message, said), said
    assert not any((tmp_path / "out").iterdir())
