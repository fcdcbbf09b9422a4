"""Killed at any layer and started again, a run gives the same bits, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.streaming import killed_run
from tests.streaming.conftest import Open, layers_read


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that have imported everything already: many may die for the time of one import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.streaming.killed_run"])
    return context


@pytest.mark.parametrize(
    ("dies_in", "goes_on_at"),
    [("layer-0/1.pt", 0), ("layer-1/2.pt", 1), ("readings-1.pt", 1), ("note-0", 0), ("note-1", 1)],
)
@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
def test_killed_and_started_again(
    dies_in: str,
    goes_on_at: int,
    processes: ForkServerContext,
    checkpoint: Path,
    opened: Open,
    resident: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = tmp_path / "states"
    place = dies_in if "/" in dies_in or dies_in.startswith("note") else f"states/{dies_in}"
    process = processes.Process(target=killed_run.run, args=(str(checkpoint), str(states), place))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    assert list(states.rglob("*.pt")), "it died before it wrote anything"
    reads = layers_read(monkeypatch)
    again = killed_run.attribute(opened(state_dir=states))
    assert reads == list(range(goes_on_at, 3))
    assert torch.equal(again.affinity, killed_run.attribute(resident).affinity)
    assert list(states.iterdir()) == []


# The small rest is read when a model is opened, then the embedding, then one layer after the other.
_EVERYWHERE = [("attribute", ("read", number)) for number in (3, 4, 5)]
_LATER = [("moments", ("read", 4)), ("solve", ("read", 6)), ("solve", ("read", 12))]
_TRAINING = [("train", ("read", 4)), ("train", ("step", 1)), ("train", ("step", 3))]


@pytest.mark.parametrize(("stage", "dies_in"), [*_EVERYWHERE, *_LATER, *_TRAINING])
@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
@pytest.mark.filterwarnings("ignore:fewer tokens of the .* set reach:UserWarning")
def test_every_stage_ends_in_the_same_bits(
    stage: str,
    dies_in: tuple[str, int],
    processes: ForkServerContext,
    checkpoint: Path,
    opened: Open,
    resident: PreTrainedModel,
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    process = processes.Process(target=killed_run.run_stage, args=(stage, str(checkpoint), str(work), dies_in))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    # As an earlier process left it: this one goes on, and the model in memory has never stopped.
    found = killed_run.STAGES[stage](opened(state_dir=work / "states"), work / "output")
    expected = killed_run.STAGES[stage](resident, tmp_path / "resident")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(value.any() for value in found.values())
    assert list((work / "states").glob("*")) == []
