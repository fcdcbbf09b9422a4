"""Folders: a dense checkpoint with groups beside it, merged into, exported, and refused where something is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.dense.conftest import logits, make_groups, make_model, weights
from tests.dense.test_method import adapted
from uoe_peft.attribution import ExpertAttribution
from uoe_peft.cli import main
from uoe_peft.dense import FILE, NeuronGroups, factorize, is_factorized, load_factorized, to_dense
from uoe_peft.export import export_lora, merge_checkpoint, unmerge_checkpoint
from uoe_peft.moe import find_moe_blocks
from uoe_peft.training import UnlearningTrainer
from uoe_peft.tuner import UOEConfig


def save(folder: Path, *, family: str = "llama", dtype: torch.dtype = torch.float32, shards: str = "30KB") -> Path:
    """A factorized folder in shards."""
    make_model(family).to(dtype).save_pretrained(folder, max_shard_size=shards)
    make_groups().save(folder / FILE)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_the_loader_puts_neurons_into_their_groups(tmp_path: Path) -> None:
    folder = save(tmp_path / "grouped")
    assert is_factorized(folder) and not is_factorized(tmp_path) and not is_factorized("org/model")
    model = load_factorized(folder, dtype=torch.float32)
    expected = factorize(make_model(), make_groups())
    for found, wanted in zip(find_moe_blocks(model), find_moe_blocks(expected), strict=True):
        assert torch.equal(found.storage.weight("gate_up_proj", 5), wanted.storage.weight("gate_up_proj", 5))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # the groups' file disturbs nobody
    assert all(torch.equal(t, dense.state_dict()[name]) for name, t in weights(make_model()).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"delta_type": "low_rank", "r": 3}, {"target_projections": ["down_proj"], "strength": 0.3}]
)
def test_a_merge_on_disk_gives_the_bits_of_one_in_memory(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, object]
) -> None:
    folder = save(tmp_path / "grouped", dtype=dtype, family="qwen2")
    model = adapted(load_factorized(folder, dtype=dtype), target_experts=[(1, 4), (1, 0), (2, 3)], **options)
    model.save_pretrained(tmp_path / "adapter")
    done = merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "merged", backup=tmp_path / "backup")
    found, before = tensors(tmp_path / "merged"), tensors(folder)
    expected = weights(to_dense(model.merge_and_unload()))
    assert found.keys() == before.keys()
    assert all(same_bits(tensor, expected[name]) for name, tensor in found.items())
    changed = {name for name in found if not same_bits(found[name], before[name])}
    assert changed == {edit.tensor for edit in done.tensors}
    parts = ("down_proj",) if "target_projections" in options else ("gate_proj", "up_proj", "down_proj")
    assert changed == {f"model.layers.{layer}.mlp.{part}.weight" for layer in (1, 2) for part in parts}
    assert not is_factorized(tmp_path / "merged") and FILE in done.left_out
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "backup", tmp_path / "restored")
    assert all(same_bits(tensor, before[name]) for name, tensor in tensors(tmp_path / "restored").items())


@pytest.mark.parametrize("format", ["peft", "per_expert"])
def test_a_low_rank_edit_is_an_exact_lora_of_the_dense_model(tmp_path: Path, format: str) -> None:
    folder = save(tmp_path / "grouped")
    targets = [(1, 4), (1, 2), (2, 3)]
    model = adapted(load_factorized(folder), target_experts=targets, delta_type="low_rank", r=3, strength=0.7)
    model.save_pretrained(tmp_path / "adapter")
    done = export_lora(tmp_path / "adapter", tmp_path / "lora", base=folder, format=format)  # type: ignore[arg-type]
    assert done.rank == 3 and set(done.errors.values()) == {0.0}
    plain = PeftModel.from_pretrained(make_model(), tmp_path / "lora")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(plain) - logits(make_model())).abs().max() > 0.1


def test_a_full_edit_is_a_lora_of_the_rank_of_a_group(tmp_path: Path) -> None:
    folder = save(tmp_path / "grouped")
    model = adapted(load_factorized(folder))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="name a rank"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", base=folder)
    export_lora(tmp_path / "adapter", tmp_path / "lora", base=folder, rank=16)
    plain = PeftModel.from_pretrained(make_model(), tmp_path / "lora")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_other_groups_is_not_merged(tmp_path: Path) -> None:
    folder = save(tmp_path / "grouped")
    adapted(load_factorized(folder)).save_pretrained(tmp_path / "adapter")
    make_groups(seed=9).save(folder / FILE)
    with pytest.raises(ValueError, match="groups of neurons"):
        merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "merged")
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match="A dense model is factorized first"):
        merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_not_finite_is_not_merged(tmp_path: Path) -> None:
    folder = save(tmp_path / "grouped")
    model = adapted(load_factorized(folder))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).view(-1)[7] = torch.inf
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="NaNs detected"):
        merge_checkpoint(folder, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_broken_and_foreign_groups_beside_a_model_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "grouped")
    make_groups(neurons=54).save(folder / FILE)
    with pytest.raises(ValueError, match="54 neurons in layer 0"):
        load_factorized(folder)
    (folder / FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_factorized(folder)
    (folder / FILE).unlink()
    with pytest.raises(FileNotFoundError, match=FILE):
        load_factorized(folder)


def test_the_trainer_takes_the_folder_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, forget: object, retain: object
) -> None:
    from tests.training.conftest import make_args

    folder = save(tmp_path / "grouped")
    trainer = UnlearningTrainer(
        str(folder),
        make_args(output_dir=str(tmp_path / "out"), max_steps=1),
        train_dataset=forget,  # type: ignore[arg-type]
        retain_dataset=retain,  # type: ignore[arg-type]
        processing_class=tokenizer,
        peft_config=UOEConfig(target_experts=[(1, 4)], train_router=False),
    )
    assert find_moe_blocks(trainer.model)[0].num_experts == 6


@pytest.fixture
def shell(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, forget: object, retain: object) -> Path:
    """A folder with a dense model, `both.jsonl`, `forget.jsonl` and `retain.jsonl`."""
    make_model().save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    rows = {"forget": list(forget), "retain": list(retain)}  # type: ignore[call-overload]
    for name, own in {**rows, "both": rows["forget"] + rows["retain"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return tmp_path


def run(command: str) -> None:
    main(command.split())


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
def test_from_the_shell_to_an_ordinary_dense_checkpoint(
    shell: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shell)
    run("factorize --model_name_or_path dense --dataset_name_or_path both.jsonl --num_experts 6 --output_dir grouped")
    assert "3 layers, 6 groups of 8 neurons each" in capsys.readouterr().out
    groups = NeuronGroups.load(shell / "grouped" / FILE)
    assert (groups.num_groups, sorted(groups.by_layer)) == (6, [0, 1, 2])
    before = tensors(shell / "dense")
    assert all(same_bits(tensor, before[name]) for name, tensor in tensors(shell / "grouped").items())
    left = {path.name for path in (shell / "dense").iterdir()}
    assert {path.name for path in (shell / "grouped").iterdir()} == left | {FILE}

    sets = "--model_name_or_path grouped --forget_dataset forget.jsonl --retain_dataset retain.jsonl"
    run(f"attribute {sets} --score contrast --output a.json")
    assert ExpertAttribution.load("a.json").affinity.shape == (3, 6)
    run(
        f"unlearn {sets} --target_experts 1:4 --train_router false --forget_loss npo --output_dir adapter "
        "--max_steps 2 --use_cpu true --dataloader_pin_memory false --learning_rate 0.01 "
        "--report_to none --disable_tqdm true --compare_examples 0 --per_device_train_batch_size 4"
    )
    run("merge --base grouped --adapter adapter --output merged")
    after = tensors(shell / "merged")
    own = (groups.by_layer[1] == 4).nonzero().flatten().tolist()
    for name, tensor in after.items():
        by_column = name.endswith("down_proj.weight")
        rows, old = (t.T if by_column else t for t in (tensor, before[name]))
        changed = (rows != old).any(dim=-1).nonzero().flatten().tolist() if rows.dim() > 1 else []
        assert changed == (own if "layers.1.mlp" in name else []), name
    assert not (shell / "merged" / FILE).exists()
    assert type(AutoModelForCausalLM.from_pretrained(shell / "merged")).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--num_experts 7 --output_dir out", "cannot be divided into 7 groups"),
        ("--num_experts 6 --output_dir dense", "exists and is not an empty folder"),
        ("--num_experts 6 --output_dir out --model_name_or_path nowhere/at/all", "there is no folder"),
    ],
)
def test_what_the_stage_cannot_do_is_said_and_nothing_written(
    shell: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    monkeypatch.chdir(shell)
    words = ["factorize", "--model_name_or_path", "dense", "--dataset_name_or_path", "both.jsonl"]
    with pytest.raises(SystemExit) as stop:
        main([*words, *command.split()])
    assert stop.value.code in (1, 2)
    assert message in capsys.readouterr().err
    assert not (shell / "out").exists()


def test_a_factorized_model_is_not_streamed(shell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_groups().save(shell / "dense" / FILE)
    sets = ["--forget_dataset", str(shell / "forget.jsonl"), "--output", str(shell / "a.json")]
    with pytest.raises(SystemExit):
        main(["attribute", "--model_name_or_path", str(shell / "dense"), *sets, "--stream", "true"])
    assert "leave out stream" in capsys.readouterr().err
