"""What a newcomer types, mistakes included: each answer is short and says what to do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerControl
from trl.trainer.sft_config import SFTConfig

from uoe_peft.cli import STAGES, main, message_of
from uoe_peft.cli.help import help_of, options_of, path_of
from uoe_peft.cli.loading import load_rows, with_columns
from uoe_peft.cli.outputs import check_file, check_folder
from uoe_peft.cli.stopping import StopAfterStep
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.training import UnlearningConfig

BASE = str(checkpoint_path("base"))


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    """What the command writes to its standard error."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code
    return capsys.readouterr().err.strip()


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    for name, topic, ending in (("forget", FORGET_TOPIC, "jsonl"), ("retain", TOPICS[0], "tsv")):
        rows = load_facts([topic]).select(range(6)).select_columns(["question", "answer"])
        path = tmp_path / f"{name}.{ending}"
        rows.to_json(path) if ending == "jsonl" else rows.to_csv(path, sep="\t")
    return {"forget": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "retain.tsv")}


def test_help_needs_no_torch_and_little_time() -> None:
    code = (
        "import sys\nfrom uoe_peft.cli import main\n"
        "try: main(['unlearn', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'trl', 'peft'} & set(sys.modules)))"
    )
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.process_time() - started < 2


def test_help_shows_our_options_first_as_they_are() -> None:
    shown = {option.name: option for option in options_of("training/config.py", "UnlearningConfig")}
    of_trl = {field.name for field in fields(SFTConfig)}
    ours = {field.name: field for field in fields(UnlearningConfig) if field.name not in of_trl}
    assert set(ours) <= set(shown)
    for name, field in ours.items():
        assert shown[name].text == field.metadata["help"]
        assert shown[name].default == str(field.default)
    assert shown["forget_loss"].choices[:2] == ("grad_ascent", "npo")
    text = help_of("unlearn")
    assert text.index("--model_name_or_path") < text.index("--retain_loss") < text.index("--num_train_epochs")
    assert "--hub_strategy" not in text


@pytest.mark.parametrize("stage", STAGES)
def test_help_tells_every_option_of_a_stage(stage: str) -> None:
    from importlib import import_module

    path = path_of(stage)
    module = import_module(f"uoe_peft.{path.removesuffix('.py').replace('/', '.')}")
    options: Any = next(value for name, value in vars(module).items() if name.endswith("Arguments"))
    for field in fields(options):
        needed = field.default is MISSING and field.default_factory is MISSING
        assert f"--{field.name}" in help_of(stage)
        assert needed == any(
            option.name == field.name and option.default is None for option in options_of(path, options.__name__)
        )


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "uoe-peft 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--forget_data", "x"], 2, "unknown option --forget_data; did you mean --forget_dataset"),
        (["--model", "x"], 2, "arguments are required: .*--model_name_or_path"),
        (["--batch_size", "many"], 2, "invalid int value: 'many'"),
        (["--config", "absent.yaml"], 1, "there is no file absent.yaml"),
    ],
)
def test_mistaken_options_are_answered_in_a_line(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = [] if "--model" in arguments else ["--model_name_or_path", BASE, "--forget_dataset", "x.jsonl"]
    answer = said(["attribute", *needed, *arguments], capsys, code=code)

    assert re.search(message, answer), answer
    assert len(answer.splitlines()) <= 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "there is no file or folder"),
        ("empty.jsonl", "", "is empty; expected one row a line"),
        ("broken.json", "{", "cannot read .* as json"),
        ("notes.txt", "text", r"expected a file that ends in \.json"),
        ("headings.csv", "question,answer\n", "cannot read .* as csv|holds no rows"),
        ("blank.jsonl", "\n\n", "holds no rows"),
    ],
)
def test_sets_that_cannot_be_read_are_named(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name))


def test_a_folder_of_files_is_one_set(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.tsv").write_text(f"question\tanswer\nwho, {name}?\tme\n")
    assert load_rows(str(tmp_path))["question"][:] == ["who, a?", "who, b?"]
    (tmp_path / "c.csv").write_text("question\nwhere?\n")
    with pytest.raises(ValueError, match=r"several kinds \(\.csv, \.tsv\)"):
        load_rows(str(tmp_path))


def test_columns_are_named_and_may_become_a_chat() -> None:
    rows = Dataset.from_list([{"question": "who?", "answer": "me", "prompt": "old"}])
    named = with_columns(rows, "x", prompt="question", completion="answer", chat=False)
    assert named[0] == {"prompt": "who?", "completion": "me"}
    chat = with_columns(rows, "x", prompt="question", completion="answer", chat=True)[0]
    assert chat["prompt"] == [{"role": "user", "content": "who?"}]
    assert chat["completion"] == [{"role": "assistant", "content": "me"}]
    with pytest.raises(ValueError, match=r"no column 'q' for --prompt_column; it has \['question'"):
        with_columns(rows, "x", prompt="q", completion=None, chat=False)


@pytest.mark.parametrize(("name", "message"), [("/no/such/model", "there is no folder"), (".", "has no config.json")])
def test_models_that_are_not_there_are_named(
    name: str, message: str, sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "a.json")]
    answer = said(
        ["attribute", "--model_name_or_path", name, "--forget_dataset", sets["forget"], *output], capsys, code=1
    )
    assert message in answer.splitlines()[-1]  # above it: the bars of the data sets


SETS = ["--forget_dataset", "{forget}", "--prompt_column", "question", "--completion_column", "answer"]
ATTRIBUTE = ["attribute", "--model_name_or_path", BASE, *SETS, "--output", "{here}/a.json"]
UNLEARN = ["unlearn", "--model_name_or_path", BASE, *SETS, "--retain_dataset", "{retain}", "--output_dir", "{here}/u"]
MERGE = ["--adapter", "{here}/adapter", "--output", "{here}/m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ATTRIBUTE, "--dtype", "float23"], "--dtype must be one of auto, bfloat16, float16, float32, got 'float23'"),
        ([*ATTRIBUTE, "--device_map", "cuda:99"], r"--device_map cuda:99 is no device of this machine \(.*\); leave"),
        ([*ATTRIBUTE, "--top", "0"], "--top must be at least 1, got 0"),
        ([*ATTRIBUTE, "--model_name_or_path", "{forget}"], "is a file; pass the folder that holds the model"),
        ([*UNLEARN, "--compare_examples", "-3"], "--compare_examples must be at least 0, got -3"),
        ([*UNLEARN, "--resume_from_checkpoint", "true"], r"there is no checkpoint in \S+/u to go on from; leave out"),
        ([*UNLEARN, "--resume_from_checkpoint", "/nope"], "there is no checkpoint in /nope to go on from"),
        (
            ["inspect", "--adapter", "{here}"],
            r"there is no adapter at \S+ \(.*\); pass the folder that save_pretrained",
        ),
        (["evaluate", "--adapter", "{here}/none", "--output_dir", "{here}/e"], "adapter_config.json|no adapter at"),
        (["card", "--adapter", "{here}"], "there is no adapter at"),
        (
            ["evaluate", "--adapter", "{here}", "--output_dir", "{here}/e"],
            "is in the adapter's folder, which is upload",
        ),
        (
            ["merge", "--base", "/no/base", *MERGE],
            "there is no folder /no/base here, and the Hub did not give|no adapter",
        ),
        (["merge", "--base", BASE, *MERGE], "there is no adapter at"),
        (["unmerge", "--merged", BASE, "--backup", "{here}", "--output", "{here}/m"], "pass the folder that merge_"),
        (
            ["report", "--reports", "{forget}", "--output", "{here}/c"],
            "is no report .*; pass a folder that `uoe-peft ev",
        ),
        (["plan", "--model_name_or_path", "/no/model"], "there is no folder /no/model; pass the folder of a model"),
        (["demo", "--output_dir", "{forget}"], "--output_dir .* is a file; expected a folder"),
    ],
)
def test_mistakes_are_answered_before_the_work(
    arguments: list[str], message: str, sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = said([word.format(here=tmp_path, **sets) for word in arguments], capsys, code=1)
    last = [line for line in answer.splitlines() if line.strip()][-1]  # above it: the bars of the data sets
    assert last.startswith(f"uoe-peft {arguments[0]}: ") and re.search(message, last), answer
    assert "Error" not in last


def test_a_demo_does_not_write_over_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "holds an earlier result" in said(["demo", "--output_dir", str(tmp_path)], capsys, code=1)


def test_outputs_are_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("earlier")
    with pytest.raises(ValueError, match="exists; name another --output, or pass --overwrite"):
        check_file(str(tmp_path / "a.json"), overwrite=False, option="output")
    check_file(str(tmp_path / "a.json"), overwrite=True, option="output")
    assert (tmp_path / "a.json").read_text() == "earlier"
    with pytest.raises(ValueError, match="is a folder"):
        check_file(str(tmp_path), overwrite=True, option="output")
    with pytest.raises(ValueError, match="cannot write to"):
        check_folder(str(tmp_path / "a.json" / "below"), overwrite=False, option="output_dir", own=())
    with pytest.raises(ValueError, match="holds an earlier result"):
        check_folder(str(tmp_path), overwrite=False, option="output_dir", own=("a.json",))
    check_folder(str(tmp_path / "new"), overwrite=False, option="output_dir", own=("a.json",))
    assert list((tmp_path / "new").iterdir()) == []


def test_a_first_signal_stops_after_the_step_and_saves_a_second_one_at_once() -> None:
    stopping, control = StopAfterStep(), TrainerControl()
    nothing: Any = None
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell has put the tests into the background
    with stopping.listening():
        with pytest.raises(KeyboardInterrupt):  # no step has begun
            signal.raise_signal(signal.SIGTERM)
        stopping.on_step_begin(nothing, nothing, control)
        signal.raise_signal(signal.SIGTERM)
        assert not control.should_save
        stopping.on_step_end(nothing, nothing, control)
        assert control.should_save and control.should_training_stop
        with pytest.raises(KeyboardInterrupt):  # once the checkpoint is there
            stopping.on_save(nothing, nothing, control)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_unexpected_errors_name_their_type() -> None:
    assert message_of(ValueError("one\n two")) == "one two"
    assert message_of(KeyError("UOE")).splitlines() == ["KeyError: 'UOE'", "--traceback shows where this was raised"]


def test_unlearn_ends_with_expert_table_adapter_and_picture_and_is_not_written_over(
    sets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ["--prompt_column", "question", "--completion_column", "answer", "--target_experts", "0:4"]
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
    few = ["--max_steps", "2", "--logging_steps", "1", "--dtype", "float32", "--learning_rate", "5e-3"]
    places = ["--forget_dataset", sets["forget"], "--retain_dataset", sets["retain"]]
    command = ["unlearn", "--model_name_or_path", BASE, *places, *columns, *quiet, *few]
    assert "unlearn needs --output_dir" in said(command, capsys, code=1)
    main([*command, "--output_dir", str(tmp_path / "adapter")])
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    before, after = next((float(line[2]), float(line[4])) for line in lines if line[:2] == ["forget", "loss"])
    assert after > before
    assert any(line[:2] == ["0", "4"] for line in lines)
    assert "target experts: as --target_experts names them" in shown
    assert (tmp_path / "adapter" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "adapter" / "adapter_model.safetensors") in shown
    assert "holds an earlier result" in said([*command, "--output_dir", str(tmp_path / "adapter")], capsys, code=1)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written
    done = subprocess.run(
        [sys.executable, "-m", "uoe_peft.cli", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
