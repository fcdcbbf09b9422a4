"""Ctrl-C and SIGTERM on running stages: a run that can go on, nothing temporary, and the same adapter in the end."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.forked import forked
from uoe_peft.cli import main
from uoe_peft.cli.stages.on_disk import inspect as inspect_stage
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`unlearn` with an expert of the last layer, so that what enters it is kept in temporary files."""
    words = ["unlearn", "--model_name_or_path", str(checkpoint_path("base")), "--target_experts", "3:2"]
    for name, topic in (("forget", FORGET_TOPIC), ("retain", TOPICS[0])):
        rows = load_facts([topic]).select(range(12)).select_columns(["prompt", "completion"])
        rows.to_json(tmp_path / f"{name}.jsonl")
        words += [f"--{name}_dataset", str(tmp_path / f"{name}.jsonl")]
    words += ["--num_train_epochs", "6", "--per_device_train_batch_size", "3", "--learning_rate", "5e-3"]
    words += ["--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
    return [*words, "--dataloader_pin_memory", "false", "--compare_examples", "0", "--dtype", "float32"]


def interrupted(words: list[str], number: int, *, steps: int, folder: Path) -> str:
    """What a process says that gets a signal after so many steps were logged."""
    states, said = folder / "states", folder / "said"
    states.mkdir(exist_ok=True)
    said.unlink(missing_ok=True)
    parent = os.getpid()

    def work() -> None:
        tempfile.tempdir = str(states)
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        watched = os.fork()
        if watched == 0:
            send(number, os.getppid())
            os._exit(0)
        main(words)

    def send(number: int, run: int) -> None:
        """Once enough steps are logged, with the temporary files there."""
        for _ in range(3000):
            if said.exists() and said.read_text().count("'forget_accuracy'") >= steps:
                (folder / "seen").write_text(" ".join(path.name for path in states.iterdir()))
                os.kill(run, number)
                return
            time.sleep(0.02)

    assert os.getpid() == parent
    code = forked(work)
    text = said.read_text()
    assert code == 130, text
    assert "uoe-prefix-" in (folder / "seen").read_text()
    assert not list(states.iterdir())
    assert "Traceback" not in text
    return text


def test_a_stopped_run_goes_on_to_the_adapter_of_one_that_was_not(command: list[str], tmp_path: Path) -> None:
    main([*command, "--output_dir", str(tmp_path / "whole")])
    words = [*command, "--output_dir", str(tmp_path / "stopped")]
    for number, steps in ((signal.SIGINT, 3), (signal.SIGTERM, 2)):
        said = interrupted(words, number, steps=steps, folder=tmp_path)
        line = said.splitlines()[-1]
        assert "stopping after this step" in said and not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
        found = re.search(r"stopped\. A checkpoint is in (\S+); to go on: (uoe-peft .*)$", line)
        assert found is not None and Path(found[1], "optimizer.pt").is_file()
        _, *words = shlex.split(found[2])
    steps_done = int(found[1].rpartition("-")[2])
    assert 5 <= steps_done < 24
    main(words)
    name = "adapter_model.safetensors"
    whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "stopped"))
    assert whole.keys() == resumed.keys() and all(whole[key].equal(resumed[key]) for key in whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_every_stage_ends_in_order(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[str] = []

    def work(_: Any) -> None:
        try:
            signal.raise_signal(number)
        finally:
            left.append("in order")

    # What Python does by itself: a shell that puts the tests into the background lets them ignore it.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    before: Callable[..., Any] | int | None = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(inspect_stage, "run", work)
    try:
        with pytest.raises(SystemExit) as stop:
            main(["inspect", "--adapter", "x"])
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert stop.value.code == 130 and left == ["in order"]
    assert capsys.readouterr().err == "\nuoe-peft inspect: stopped.\n"
    assert signal.getsignal(signal.SIGTERM) is before
