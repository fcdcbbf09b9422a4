"""Two processes must do what one process does with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(output, batch_size, *options, num_processes=1):
    (output / "temporary").mkdir(parents=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(SCRIPT), str(output), str(batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    environment["TMPDIR"] = str(output / "temporary")
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"rank{rank}.pt") for rank in range(num_processes)]


@pytest.fixture(scope="module", params=[(), ("--rmu",)], ids=["npo", "rmu"])
def one_and_two(request, tmp_path_factory):
    """NPO runs the whole model; RMU ends each pass at its layer, but for the steps that are logged."""
    folder = tmp_path_factory.mktemp("distributed")
    return run(folder / "one", 4, *request.param), run(folder / "two", 2, *request.param, num_processes=2)


def test_gradients_are_equal(one_and_two):
    (one,), two = one_and_two
    assert one["gradients"]
    for name, gradient in one["gradients"].items():
        for rank in two:
            torch.testing.assert_close(rank["gradients"][name], gradient, atol=1e-6, rtol=1e-4)


def test_pairs_are_equal_also_in_the_second_epoch(one_and_two):
    (one,), (first, second) = one_and_two
    together = [a + b for a, b in zip(first["pairs"], second["pairs"], strict=True)]
    assert [sorted(step) for step in together] == [sorted(step) for step in one["pairs"]]
    first_epoch, second_epoch = (sorted(steps[0] + steps[1]) for steps in (one["pairs"][:2], one["pairs"][2:]))
    assert first_epoch != second_epoch


def test_logged_losses_are_of_the_whole_batch(one_and_two):
    (one,), (first, _) = one_and_two
    for name in ("loss_forget", "loss_retain", "loss_anchor"):
        assert first["logs"][name] == pytest.approx(one["logs"][name], rel=1e-4)


def test_processes_choose_the_same_strength(one_and_two):
    (one,), (first, second) = one_and_two
    assert first["strength"] == second["strength"] and first["choice"] == second["choice"]
    assert first["strength"] == pytest.approx(one["strength"], abs=1 / 32)
    for scale in (0.0, 0.5, 1.0):
        assert first["choice"][scale] == pytest.approx(one["choice"][scale], rel=1e-3)


def test_processes_share_one_prefix_cache_which_is_removed_at_the_end(one_and_two, tmp_path_factory):
    _, (first, second) = one_and_two
    assert all(first["from_cache"]) and all(second["from_cache"])
    assert first["caches"] == second["caches"]
    assert len(first["caches"]) == 1
    assert list(tmp_path_factory.getbasetemp().glob("distributed*/*/temporary/uoe-prefix-*")) == []


def test_a_process_that_sends_no_token_to_the_expert(tmp_path):
    first, second = run(tmp_path / "starved", 2, "--starve-rank-1", num_processes=2)
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name])
    assert any("uoe_delta" in name and value.any() for name, value in first["state"].items())
