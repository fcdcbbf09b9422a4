"""`evaluate` and `report` from the shell, on the bundled model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from uoe_peft.cli import main
from uoe_peft.cli.stages.evaluate import EvaluateArguments, attacks_of, base_of, check_options, split_off, suite_of
from uoe_peft.cli.stages.report import load_reports
from uoe_peft.evaluation import UnlearningReport
from uoe_peft.testbed import TOPICS, checkpoint_path, load_facts
from uoe_peft.tuner import UOEConfig


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype=torch.float32)
    tuned = get_peft_model(model, UOEConfig(target_experts=[(0, 9)]))
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(str(folder))
    return folder


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    columns = ["prompt", "completion", "topic"]
    parts = {"forget": load_facts(["potions"]).select(range(7)), "retain": load_facts(TOPICS[:2]).shuffle(seed=0)}
    for name, rows in parts.items():
        rows.select(range(7)).select_columns(columns).to_json(str(tmp_path / f"{name}.jsonl"))
    return {f"{name}_dataset": str(tmp_path / f"{name}.jsonl") for name in parts}


def test_an_adapter_is_evaluated_and_reports_are_compared(
    adapter: Path, sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name}={value}" for name, value in sets.items()]
    output = tmp_path / "out"
    few = ["--max_new_tokens", "6", "--attack_rows", "2", "--attack_examples", "2", "--validation_examples", "2"]
    chosen = ["--by", "topic", "--attacks", "int8", "few_shot", "--retain_share", "0.9", "--dtype", "float32"]
    main(["evaluate", "--adapter", str(adapter), *flags, *few, *chosen, "--output_dir", str(output)])
    report = UnlearningReport.load(output / "report.json")
    assert report.scores["base"]["forget"].num_examples == 3  # of 7, 2 for attacks and 2 to choose the scale
    assert {part.set_name for part in report.by_value} == {"forget", "retain"}
    assert [run.result.name for run in report.attacks][1] == "few_shot"
    assert report.calibration is not None
    assert report.calibration.scale == 1.0  # a fresh adapter harms nothing
    assert (output / "report.html").is_file()
    main(["report", "--reports", str(output), f"again={output}", "--output", str(tmp_path / "both")])
    assert "| again |" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "both.html").read_text()


def arguments(**options: Any) -> EvaluateArguments:
    return EvaluateArguments(adapter="a", **options)


def test_suites_by_name(tmp_path: Path) -> None:
    (tmp_path / "law_test.csv").write_text("question,A,B,answer\nWho?,a,b,0\n")
    suite = suite_of(arguments(suite="testbed", mmlu=str(tmp_path)))
    assert [part.name for part in suite.sets][-1] == "mmlu"
    for options, message in {
        ("plain", None): "needs --forget_dataset and --retain_dataset",
        ("tofu", None): "needs --tofu",
        ("muse", None): "unknown suite 'muse'",
    }.items():
        with pytest.raises(ValueError, match=message):
            suite_of(arguments(suite=options[0]))


def test_rows_set_aside_are_not_evaluated(tmp_path: Path) -> None:
    suite = suite_of(arguments(suite="testbed"))
    options = tmp_path / "attacks.yaml"
    options.write_text("relearning: {learning_rate: 0.5}\n")
    asked = arguments(attacks=["relearning", "paraphrase"], attack_options=str(options), attack_rows=30)
    attacks, rest = attacks_of(asked, suite, tokenizer="t")
    relearning, paraphrase = (attack.keywords for attack in attacks.values())  # type: ignore[attr-defined]
    assert relearning["learning_rate"] == 0.5
    assert paraphrase == {"column": "paraphrased_prompt"}
    used, left = set(relearning["dataset"]["prompt"]), set(rest.sets[0].rows["prompt"])
    assert not used & left
    assert len(used | left) == len(suite.sets[0].rows)
    with pytest.raises(ValueError, match=r"has options of \['relearning'\], which --attacks does not ask for"):
        attacks_of(arguments(attacks=["int8"], attack_options=str(options)), suite, tokenizer="t")
    with pytest.raises(ValueError, match="the forget set has 200 rows, of which 200"):
        split_off(suite, 200, seed=0)


def test_relearning_on_further_sets(sets: dict[str, str]) -> None:
    asked = arguments(
        suite="testbed", attacks=["relearning", "int8"], relearning_datasets=[f"other={sets['retain_dataset']}"]
    )
    attacks, _ = attacks_of(asked, suite_of(asked), tokenizer="t")
    assert list(attacks) == ["relearning", "int8", "relearning, other"]
    other, own = (attacks[name].keywords["dataset"] for name in ("relearning, other", "relearning"))  # type: ignore[attr-defined]
    assert other["topic"] == Dataset.from_json(sets["retain_dataset"])["topic"]
    assert set(own["topic"]) == {"potions"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["int8", "bribery"]}, r"no attack 'bribery'; there are relearning.*scale_sweep"),
        ({"attacks": ["relearning"], "relearning_datasets": ["a.jsonl"]}, "takes NAME=FILE.*got 'a.jsonl'"),
        ({"attacks": ["int8"], "relearning_datasets": ["a=b"]}, "are for the attack relearning"),
    ],
)
def test_attacks_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    asked = arguments(suite="testbed", **options)
    with pytest.raises(ValueError, match=message):
        attacks_of(asked, suite_of(asked), tokenizer="t")


def test_a_model_trained_in_full_stands_beside_its_base(adapter: Path, sets: dict[str, str], tmp_path: Path) -> None:
    """The twin in the place of a model that was trained to forget: it knows none of the forget rows."""
    flags = [f"--{name}={value}" for name, value in sets.items()]
    flags += ["--unlearned_model", str(checkpoint_path("retrained")), "--dtype", "float32", "--max_new_tokens", "6"]
    flags += ["--attacks", "int8", "scale_sweep", "--attack_examples", "2", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["evaluate", *flags])  # which base?
    main(["evaluate", *flags, "--model_name_or_path", str(checkpoint_path("base"))])
    report = UnlearningReport.load(tmp_path / "out" / "report.json")
    assert report.scores["base"]["forget"].probability > 0.9 > 0.1 > report.scores["unlearned"]["forget"].probability
    assert [run.result.name for run in report.attacks] == ["int8"]
    assert any("scale_sweep needs a PeftModel" in note for note in report.notes)
    for wrong in ({"unlearned_model": "m"}, {"adapter": None}):
        with pytest.raises(ValueError, match="pass either --adapter, or --unlearned_model"):
            base_of(replace(arguments(), **wrong))


def test_what_cannot_go_together_is_said_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match="choose the scale of an adapter"):
        check_options(replace(arguments(retain_share=0.9), adapter=None))
    with pytest.raises(ValueError, match="which a streamed one is not"):
        check_options(arguments(stream=True, attacks=["int8"]))


def test_reports_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no report at"):
        load_reports([str(tmp_path)])
    (tmp_path / "report.json").write_text('{"base": {}, "notes": []}')
    with pytest.raises(ValueError, match=f"two reports are called '{tmp_path.name}'"):
        load_reports([str(tmp_path), str(tmp_path / "report.json")])
    assert list(load_reports([str(tmp_path), f"x={tmp_path}"])) == [tmp_path.name, "x"]


def test_a_harness_reads_local_files(adapter: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from uoe_peft.evaluation.harness import load_in_harness

    rows = Dataset.from_list(
        [{"q": row["prompt"], "a": row["completion"]} for row in load_facts(["towns"]).select([0])]
    )
    rows.to_json(str(tmp_path / "rows.jsonl"))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: \"{{[' never', a]}}\"\ntarget_delimiter: ''\ndoc_to_target: 1\nmetric_list: [{metric: acc}]\n"
    )
    model = load_in_harness(adapter, dtype="float32", batch_size=2, device="cpu")
    found = lm_eval.simple_evaluate(
        model=model, tasks=["mine"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False)
    )
    assert found["results"]["mine"]["acc,none"] == 1.0
