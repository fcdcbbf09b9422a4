"""LoRA that loads without this package: exact for low rank, by the rules of those who read it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.export.conftest import FAMILIES, adapted, save_base
from tests.families import EXPERTS, logits, token_ids
from uoe_peft.export import LoraExport, export_lora
from uoe_peft.moe import find_moe_blocks

# What a user without the package does; it gets folders and prints the largest differences of logits.
STRANGER = """
import sys, warnings
sys.modules["uoe_peft"] = None  # any import of it fails
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    base = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float32)
    base.set_experts_implementation("eager")  # the only one for float64
    model = PeftModel.from_pretrained(base, folder + "/lora").eval()
    seen = load_file(folder + "/seen.safetensors")
    with torch.no_grad():
        single = model(input_ids=seen["ids"], use_cache=False).logits
        double = model.double()(input_ids=seen["ids"], use_cache=False).logits
    relative = (single - seen["single"]).abs().max() / seen["single"].abs().max()
    print(relative.item(), (double - seen["double"]).abs().max().item())
"""


@torch.no_grad()
def test_a_low_rank_adapter_is_exact_in_stock_peft_without_this_package(
    model_of: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    for family in FAMILIES:
        folder = tmp_path / family
        save_base(model_of(family), folder / "base")
        model = adapted(model_of(family), delta_type="low_rank")
        model.save_pretrained(folder / "adapter")
        assert not logits(model, token_ids()).equal(logits(model_of(family), token_ids()))
        model.get_base_model().set_experts_implementation("eager")
        # In float64, too: what float32 rounds off depends on where tensors lie in memory. Of logits of 4, 1e-6 is two
        # units in the last place: in float32 the bound is on what they differ by their size.
        seen = {"ids": token_ids(), "single": logits(model, token_ids())}
        seen["double"] = logits(model.double(), token_ids())
        save_file(seen, folder / "seen.safetensors")
        export = export_lora(folder / "adapter", folder / "lora", base=folder / "base")
        assert set(export.errors.values()) == {0.0} and not export.dropped_routers
    folders = [str(tmp_path / family) for family in FAMILIES]
    run = subprocess.run([sys.executable, "-c", STRANGER, *folders], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    differences = [float(word) for word in run.stdout.split()]
    assert len(differences) == 2 * len(FAMILIES) and max(differences) <= 1e-6, differences


def dense_deltas(model: nn.Module) -> dict[tuple[str, int], Tensor]:
    """The delta of each edited slice of the last layer, by hand from the adapter's parameters."""
    layer = find_moe_blocks(model)[-1].experts
    found = {}
    for projection, factor_b in layer.uoe_B["default"].items():
        factor_a = layer.uoe_A["default"][projection]
        for position, expert_idx in enumerate((1, 4)):
            found[projection, expert_idx] = 32 / 3 * factor_b[position] @ factor_a[position]
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("qwen2_moe", ("mlp.experts", "gate_proj", "up_proj", "down_proj")),
        ("deepseek_v3", ("mlp.experts", "gate_proj", "up_proj", "down_proj")),
        ("mixtral", ("block_sparse_moe.experts", "w1", "w3", "w2")),
    ],
)
def test_servers_get_every_expert_by_name_with_one_rank(
    family: str, names: tuple[str, str, str, str], model_of: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    export, model = exported(model_of(family), tmp_path, format="per_expert", delta_type="low_rank", train_router=False)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    experts, gate, up, down = names
    prefix = f"base_model.model.model.layers.2.{experts}"
    expected = {
        f"{prefix}.{expert_idx}.{matrix}.lora_{factor}.weight"
        for expert_idx in range(EXPERTS)
        for matrix in (gate, up, down)
        for factor in "AB"
    }
    assert set(tensors) == expected
    deltas = dense_deltas(model)
    for expert_idx in range(EXPERTS):
        pairs = {
            matrix: [tensors[f"{prefix}.{expert_idx}.{matrix}.lora_{factor}.weight"] for factor in "AB"]
            for matrix in (gate, up, down)
        }
        for factor_a, factor_b in pairs.values():
            assert factor_a.shape[0] == factor_b.shape[1] == export.rank == 3
        whole = {matrix: factor_b @ factor_a for matrix, (factor_a, factor_b) in pairs.items()}
        if expert_idx in (1, 4):
            torch.testing.assert_close(torch.cat([whole[gate], whole[up]]), deltas["gate_up_proj", expert_idx])
            torch.testing.assert_close(whole[down], deltas["down_proj", expert_idx])
        else:
            assert not any(delta.any() for delta in whole.values())


@torch.no_grad()
def test_a_stack_has_the_expert_slowest_in_a_and_fastest_in_b(
    model_of: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    _, model = exported(model_of("gpt_oss"), tmp_path, delta_type="low_rank", train_router=False)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    deltas = dense_deltas(model)
    found = 0
    for name, factor_b in tensors.items():
        if "lora_B" not in name:
            continue
        factor_a = tensors[name.replace("lora_B", "lora_A")]
        projection = "gate_up_proj" if factor_b.shape[0] == 112 else "down_proj"
        for expert_idx in range(EXPERTS):
            rows = factor_a[3 * expert_idx : 3 * expert_idx + 3]  # (R, in)
            columns = factor_b[:, expert_idx::EXPERTS]  # (out, R)
            wanted = deltas.get((projection, expert_idx), torch.zeros(len(columns), rows.shape[1]) * 3 / 32)
            torch.testing.assert_close(columns @ rows * 32 / 3, wanted)
            found += 1
    assert found == 2 * EXPERTS


def exported(
    model: PreTrainedModel, tmp_path: Path, *, format: str = "peft", rank: int | None = None, **kwargs: object
) -> tuple[LoraExport, nn.Module]:
    options = {name: kwargs.pop(name) for name in ("max_error", "drop_router") if name in kwargs}
    save_base(model, tmp_path / "base")
    peft_model = adapted(model, **kwargs)
    peft_model.save_pretrained(tmp_path / "adapter")
    export = export_lora(
        tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base", format=format, rank=rank, **options
    )
    return export, peft_model


@torch.no_grad()
def test_a_full_delta_is_cut_to_a_rank_and_the_error_is_told(
    model_of: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    export, model = exported(model_of("qwen2_moe"), tmp_path, rank=5)
    layer = find_moe_blocks(model)[-1].experts
    for projection in ("gate_up_proj", "down_proj"):
        for position, expert_idx in enumerate((1, 4)):
            singular = torch.linalg.svdvals(layer.uoe_delta["default"][projection][position].double())
            left_over = (singular[5:].square().sum() / singular.square().sum()).sqrt()
            told = export.errors[f"model.layers.2.mlp.experts.{projection}[{expert_idx}]"]
            assert told == pytest.approx(float(left_over), rel=1e-4) and told > 0.1
    assert export.errors["model.layers.2.mlp.gate.weight"] == 0  # small, so exact


def test_an_error_chooses_the_least_rank(model_of: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    export, model = exported(model_of("qwen2_moe"), tmp_path, max_error=0.3, train_router=False)
    assert max(export.errors.values()) <= 0.3
    ranks = []
    for parameter in find_moe_blocks(model)[-1].experts.uoe_delta["default"].values():
        for delta in parameter.detach():
            energy = torch.linalg.svdvals(delta.double()).square()
            missing = ((energy.sum() - energy.cumsum(0)).clamp(min=0) / energy.sum()).sqrt()
            ranks.append(int((missing > 0.3).sum()) + 1)
    assert export.rank == max(ranks)


def test_what_a_format_cannot_hold_is_refused_or_dropped_with_its_effect(
    model_of: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"cannot carry the deltas of the routers of layers \[2\]: ship the merged"):
        exported(model_of("qwen2_moe"), tmp_path / "a", format="per_expert", delta_type="low_rank")
    export, model = exported(
        model_of("qwen2_moe"), tmp_path / "b", format="per_expert", delta_type="low_rank", drop_router=True
    )
    (dropped,) = export.dropped_routers
    block = find_moe_blocks(model)[-1]
    delta = block.router.uoe_delta["default"]["weight"][0].detach()
    weight = block.router.base_layer.weight.detach()
    assert dropped.layer_idx == 2 and dropped.relative_norm == pytest.approx(float(delta.norm() / weight.norm()))
    assert 0.1 < dropped.changed_choices < 0.9 and "router of layer 2 left out" in export.summary()
    with pytest.raises(ValueError, match="which LoRA cannot hold exactly: ship the merged weights"):
        exported(model_of("qwen2_moe"), tmp_path / "c", delta_type="full")
    with pytest.raises(ValueError, match=r"input_linear\.weight holds all experts"):
        exported(model_of("granitemoe"), tmp_path / "d", format="per_expert", delta_type="low_rank", train_router=False)
    with pytest.raises(ValueError, match="rank 2 leaves an error of"):
        exported(model_of("qwen2_moe"), tmp_path / "e", rank=2, max_error=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "lora"}, "format must be one of"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"rank": True}, "rank must be an integer >= 1"),
        ({"max_error": 1.0}, "max_error must be at least 0"),
        ({"max_error": float("nan")}, "max_error must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_read(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_lora(tmp_path / "none", tmp_path / "out", base=tmp_path / "none", **options)
