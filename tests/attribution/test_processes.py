"""Several processes share the batches out and find what one finds: one launch of three serves all tests."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attribution import processes_run
from tests.attribution.processes_run import SCORES, attribute, tensors
from tests.training.conftest import make_model, make_sets, make_tokenizer
from uoe_peft.data.shares import Share, _meeting_place

COUNT = 3
pytestmark = pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    make_model().save_pretrained(folder / "base")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.attribution.processes_run"])
    running = [
        context.Process(target=processes_run.main, args=(str(folder), rank, COUNT), daemon=True)
        for rank in range(COUNT)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=300)
    assert [process.exitcode for process in running] == [0] * COUNT
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(COUNT)]


def by_hand(rows: Any) -> torch.Tensor:
    """Eq. 2, row by row: gate scores of the selected experts, mean over tokens, mean over rows. Shape `(L, E)`."""
    model, tokenizer = make_model().eval(), make_tokenizer()
    means = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
        scores = torch.stack(logits).softmax(dim=-1)  # (L, T, E)
        chosen = scores >= scores.topk(3, dim=-1).values[..., -1:]
        means.append((scores * chosen).mean(dim=1))
    return torch.stack(means).mean(dim=0)


def test_affinities_are_those_of_the_whole_set(ranks: list[dict[str, Any]]) -> None:
    forget, retain = (by_hand(rows) for rows in make_sets())
    for seen in ranks:
        torch.testing.assert_close(seen["gate"]["affinity"], forget)
        torch.testing.assert_close(seen["contrast"]["affinity"], forget - retain)
        assert seen["gate"]["forget counts"][0] == 8 and seen["gate"]["retain counts"][0] == 11


@pytest.mark.parametrize("score", SCORES)
def test_every_process_finds_what_one_finds(score: str, ranks: list[dict[str, Any]]) -> None:
    one = tensors(attribute(make_model(), score))
    assert any("low" in name for name in one) or score == "gradient"
    for seen in ranks:
        assert one.keys() == seen[score].keys()
        for name, value in one.items():
            torch.testing.assert_close(seen[score][name], value, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(seen[score][name], ranks[0][score][name], rtol=0, atol=0, equal_nan=True)


def test_a_process_without_a_batch(ranks: list[dict[str, Any]]) -> None:
    one = tensors(attribute(make_model(), retain_dataset=make_sets()[1].select(range(2))))
    for seen in ranks:
        for name, value in one.items():
            torch.testing.assert_close(seen["few"][name], value)
    # Three batches of the forget set, one of the retain set: each is read once.
    assert [seen["passes"] for seen in ranks] == [2, 1, 1]


def test_a_streamed_model_whose_states_have_one_folder(ranks: list[dict[str, Any]], folder: Path) -> None:
    for seen in ranks:
        for name, value in ranks[0]["contrast"].items():
            assert torch.equal(seen["streamed"][name], value), name
    assert [path for path in (folder / "states").rglob("*") if path.is_file()] == []


def test_errors_are_everybodys(ranks: list[dict[str, Any]]) -> None:
    nan, other_set, empty, other_score = zip(*(seen["errors"] for seen in ranks), strict=True)
    assert nan[1].startswith("ValueError: the router of layer 1 gives NaN")
    assert nan[0] == nan[2] and nan[0].startswith("RuntimeError: process 1 of 3 has failed: ValueError: the router of")
    assert set(other_set) == {other_set[0]} and "processes 0 and 1 read different forget sets" in other_set[0]
    assert empty[2].startswith("ValueError: the forget set is empty")
    assert "process 2 of 3 has failed: ValueError: the forget set is empty" in empty[0]
    assert all("processes 0 and 1 read different forget sets" in message for message in other_score)


def test_a_model_that_processes_hold_in_parts_is_run_by_all(ranks: list[dict[str, Any]]) -> None:
    assert [seen["split"] for seen in ranks] == [(True, Share(), Share(rank, COUNT)) for rank in range(COUNT)]


def test_a_random_score_needs_nobody(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["alone"], attribute(make_model(), "random").affinity)


def test_the_trainer_finds_the_same_experts(ranks: list[dict[str, Any]]) -> None:
    best = by_hand(make_sets()[0])
    assert all(seen["auto"] == [divmod(int(best.argmax()), best.shape[1])] for seen in ranks)


def test_sums_meet_where_the_backend_can_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(
        current_accelerator=lambda: torch.device("cuda"),
        current_device_index=lambda: 3,
    )
    monkeypatch.setattr(torch, "accelerator", accelerator)
    for config, device in (("cuda:nccl", "cuda:3"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo", "cpu")):
        monkeypatch.setattr("torch.distributed.get_backend_config", lambda config=config: config)
        assert _meeting_place(torch.device("cpu")) == torch.device(device)


def test_shares_are_disjoint_and_whole() -> None:
    for count in (1, 2, 5):
        shares = [Share(rank, count) for rank in range(count)]
        own = [range(share.rank, 7, share.count) for share in shares]
        assert sorted(position for part in own for position in part) == list(range(7))
        for share, part in zip(shares, own, strict=True):
            ends = [-1, *part]
            assert [share.left_out_before(i) for i in range(len(part))] == [
                b - a - 1 for a, b in zip(ends, part, strict=False)
            ]
