"""Engines that split weights over processes do what one process does: one launch of two processes serves all tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.training.conftest import KeepGradients, make_args, make_model, make_sets, make_tokenizer, with_uoe
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.training import UnlearningTrainer
from uoe_peft.training.processes import check_engine
from uoe_peft.tuner import UOEConfig

SCRIPT = Path(__file__).with_name("engines_run.py")
IDS = torch.tensor([[5, 6, 7, 8, 9], [31, 32, 33, 34, 2]])
SHARDED = ["tp", "tp_ep", "fsdp", "fsdp_ep"]
SPLIT = [*SHARDED, "fsdp_2"]
ENGINES = [*SPLIT, "ddp"]
LOGGED = ("loss", "loss_forget", "loss_retain", "loss_anchor", "forget_selection_overlap", "retain_selection_overlap")


def launch(folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    logs = [folder / f"log{rank}" for rank in range(2)]
    running = []
    for rank, log in enumerate(logs):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as out:
            command = [sys.executable, str(SCRIPT), str(folder)]
            running.append(subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=900) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    make_model().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return launch(folder)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    """What one process does with the whole batch."""
    keep, (forget, retain) = KeepGradients(), make_sets()
    trainer = UnlearningTrainer(
        with_uoe(load(folder)),
        make_args(output_dir=str(folder / "one"), per_device_train_batch_size=4, log_routing=True),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=make_tokenizer(),
        callbacks=[keep],
    )
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        return {
            "gradients": keep.gradients,
            "state": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
            "logs": trainer.state.log_history[:2],
            "logits": model(input_ids=IDS).logits,
            "base_logits": load(folder).eval()(input_ids=IDS).logits,
            "generated": model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False),
        }


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_losses_and_adapter_are_those_of_one_process(one, two, engine):
    assert all(value.any() for value in one["state"].values())
    for rank in two:
        seen = rank[engine]
        assert seen["sharded"] == (engine != "ddp")
        for kind in ("gradients", "state"):
            assert seen[kind].keys() == one[kind].keys()
            for name, value in one[kind].items():
                torch.testing.assert_close(seen[kind][name], value, atol=1e-6, rtol=1e-4)
    for log, expected in zip(two[0][engine]["logs"], one["logs"], strict=True):
        assert {name: log[name] for name in LOGGED} == pytest.approx(
            {name: expected[name] for name in LOGGED}, rel=1e-4
        )
    first, second = (rank[engine]["state"] for rank in two)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_edited_model_says_what_it_says_in_one_process(one, two, engine):
    assert (one["logits"] - one["base_logits"]).abs().max() > 1e-3
    for rank in two:
        for said in ("logits", "base_logits"):
            torch.testing.assert_close(rank[engine][said], one[said], atol=1e-5, rtol=1e-4)
        assert torch.equal(rank[engine]["generated"], one["generated"])


@pytest.mark.parametrize("engine", ENGINES)
def test_one_process_loads_what_was_saved(folder, one, two, engine):
    model = PeftModel.from_pretrained(load(folder), str(folder / engine / "saved")).eval()
    trained = two[0][engine]["state"]
    saved = {name: p for name, p in model.named_parameters() if ".uoe_" in name}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(p, trained[name]) for name, p in saved.items())
    assert "UOE" in (folder / engine / "saved" / "README.md").read_text()
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, one["logits"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", SHARDED)
def test_a_split_model_loads_what_was_saved(two, engine):
    for rank in two:
        torch.testing.assert_close(rank[engine]["loaded_logits"], rank[engine]["logits"], atol=1e-6, rtol=1e-5)


def test_save_pretrained_brings_an_adapter_together_that_fsdp_has_split(folder, two):
    model = PeftModel.from_pretrained(load(folder), str(folder / "by_hand"))
    trained = two[0]["fsdp_2"]["state"]
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters() if ".uoe_" in name)


def test_training_under_fsdp_resumes_where_it_was_stopped(two):
    for rank in two:
        seen = rank["fsdp_2"]
        assert seen["resumed"].keys() == seen["state"].keys()
        assert all(torch.equal(value, seen["state"][name]) for name, value in seen["resumed"].items())


@pytest.mark.parametrize("engine", SHARDED)
def test_only_the_edited_expert_is_fetched(two, engine):
    for rank in two:
        assert sorted(rank[engine]["fetched"]) == [(32, 24), (48, 32)]


def test_a_slice_comes_back_from_every_way_of_splitting_a_stack(two):
    for rank in two:
        assert len(rank["slices"]) == 7 * (6 + 5 + 1 + 3) and all(rank["slices"])


@pytest.mark.parametrize("engine", SPLIT)
def test_merging_is_refused_and_changes_nothing(two, engine):
    for rank in two:
        assert "it is sharded over processes: save the adapter" in rank[engine]["merging"]
        assert torch.equal(rank[engine]["logits_afterwards"], rank[engine]["logits"])


def test_ddp_merges_in_place(one, two):
    for rank in two:
        assert (rank["ddp"]["wrapped"], rank["ddp"]["merging"]) == ("DistributedDataParallel", "no error")
        torch.testing.assert_close(rank["ddp"]["logits_afterwards"], one["logits"], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
def test_attribution_finds_the_same_experts_in_all_processes(folder, two):
    forget, retain = make_sets()
    trainer = UnlearningTrainer(
        load(folder),
        make_args(output_dir=str(folder / "auto_one"), per_device_train_batch_size=2),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=make_tokenizer(),
        peft_config=UOEConfig(target_experts="auto"),
    )
    expected = trainer.model.peft_config["default"].target_experts
    assert [rank["auto"] for rank in two] == [(expected, []), (expected, [])]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pp", r"DistributedConfig(pp_size=...): each process has other layers"),
        ("fsdp_mixed_precision", r"DistributedConfig(fsdp_mixed_precision=...): adapters are not cast"),
        ("inside_layers", r"FSDP must shard whole decoder layers"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(two, name, message):
    for rank in two:
        assert message in rank["refusals"][name]


def accelerator_of(kind: DistributedType, **attributes: Any) -> Any:
    return SimpleNamespace(distributed_type=kind, **attributes)


def test_zero_3_and_fsdp_1_are_refused_for_edits_of_single_experts(uoe_model, model, build):
    zero = {stage: SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)) for stage in (2, 3)}
    zero_3 = accelerator_of(DistributedType.DEEPSPEED, state=zero[3])
    with pytest.raises(UnsupportedModelError, match="ZeRO-3 partitions every weight"):
        check_engine(uoe_model, zero_3)
    with pytest.raises(UnsupportedModelError, match="FSDP version 1"):
        check_engine(uoe_model, accelerator_of(DistributedType.FSDP, is_fsdp2=False))
    check_engine(uoe_model, accelerator_of(DistributedType.FSDP, is_fsdp2=True))
    check_engine(uoe_model, accelerator_of(DistributedType.DEEPSPEED, state=zero[2]))
    check_engine(build.lora(model), zero_3)


def test_weights_that_zero_3_has_partitioned_are_refused_at_injection(model):
    model.model.layers[1].mlp.experts.down_proj.ds_id = 7  # what DeepSpeed puts on every weight that it partitions
    with pytest.raises(UnsupportedModelError, match="partitioned by DeepSpeed ZeRO-3"):
        get_peft_model(model, UOEConfig(target_experts=[(1, 2)]))
