"""Checkpoints in few bits are made plain while they are streamed, against formulas that are written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.streaming.conftest import Open, SaveFamily, open_in_blocks
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.segments import find_layers
from uoe_peft.streaming import StreamedModel
from uoe_peft.streaming.quantisation import put_plain

BLOCK = (16, 20)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK, "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def say_quantised(folder: Path, form: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form}))


def assert_same_model(quantised: Path, plain: Path) -> None:
    resident = AutoModelForCausalLM.from_pretrained(plain, dtype="float32")
    streamed: Any = StreamedModel.from_pretrained(quantised, show_progress=False)
    in_blocks = open_in_blocks(quantised)
    assert streamed.dtype == in_blocks.dtype == torch.float32
    ids = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        expected = resident(input_ids=ids).logits
        assert torch.equal(streamed(input_ids=ids).logits, expected)
        assert torch.equal(in_blocks(input_ids=ids).logits, expected)
    for layer_idx in in_blocks._on_disk:
        kept, whole = (find_layers(model).get_submodule(str(layer_idx)).mlp.experts for model in (in_blocks, resident))
        for name in ("gate_up_proj", "down_proj"):
            assert all(torch.equal(getattr(kept, name)[index], one) for index, one in enumerate(getattr(whole, name)))
    for layer_idx, layer in enumerate(find_layers(resident).children()):
        streamed.keep_layers([layer_idx])
        kept = dict(find_layers(streamed).get_submodule(str(layer_idx)).named_parameters())
        for name, parameter in layer.named_parameters():
            assert torch.equal(kept[name], parameter), name
            assert kept[name].dtype == torch.float32


def in_blocks(scales: Tensor, shape: torch.Size, block: tuple[int, int] = BLOCK) -> Tensor:
    """Each block's scale for each of its weights; the last blocks are cut."""
    return scales.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)[: shape[0], : shape[1]]


def powers_of_two(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scales of eight bits, as bytes and as what they stand for: `2 ** (byte - 127)`."""
    exponents = torch.randint(118, 132, grid, dtype=torch.uint8)
    return exponents, 2.0 ** (exponents.float() - 127)


def stored_scales(form: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scales as a file holds them, and what weights are multiplied with."""
    if form == "float32":
        scales = torch.rand(grid) + 0.5
        return scales, scales
    exponents, scales = powers_of_two(grid)
    return exponents.view(torch.float8_e8m0fnu) if form == "e8m0" else exponents, scales


@pytest.mark.parametrize(
    ("form", "block"), [("float32", BLOCK), ("float32", (8, 4)), ("e8m0", BLOCK), ("bytes", BLOCK)]
)
def test_fp8_in_blocks_some_of_which_are_cut(
    form: str, block: tuple[int, int], saved_family: SaveFamily, tmp_path: Path
) -> None:
    folder, _ = saved_family("deepseek_v3")
    tensors, plain = load_file(folder / "model.safetensors"), {}
    stored: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        # As published: what is not in eight bits is narrower than what is computed in.
        stored[name] = weight.bfloat16() if form == "float32" else weight
        plain[name] = stored[name].to(weight.dtype)
        if "_proj" in name and weight.dim() == 2:
            grid = (-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
            stored[name] = weight.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"], scales = stored_scales(form, grid)
            plain[name] = stored[name].float() * in_blocks(scales, weight.shape, block)
    assert any("experts.5" in name for name in stored if name.endswith("scale_inv"))
    for made, path in ((stored, folder), (plain, tmp_path / "plain")):
        path.mkdir(exist_ok=True)
        save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text((folder / "config.json").read_text())
    form_of_all = {**FP8, "weight_block_size": block}
    say_quantised(folder, form_of_all if form == "float32" else {**form_of_all, "scale_fmt": "ue8m0"})
    model: Any = StreamedModel.from_pretrained(folder, show_progress=False)
    assert len(model._residence._reader._stacks) == (4 if block == (8, 4) else 0)  # those that are put together here
    assert_same_model(folder, tmp_path / "plain")


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_eight_bits(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(12).view(24, 128)
    codes = codes[torch.arange(24)[:, None], torch.randperm(128)]
    scales = torch.rand(3, 8).to(scale_dtype)
    stack = torch.zeros(2, 30, 128, dtype=dtype)
    put_plain(codes.view(torch.float8_e4m3fn), scales, stack[1, 2:26])
    # Sign, four bits of exponent, three of fraction; below the smallest exponent the fraction alone; no infinity.
    sign, exponent, fraction = codes // 128, codes // 8 % 16, codes % 8
    number = torch.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent.float() - 7))
    number[(exponent == 15) & (fraction == 7)] = torch.nan
    blocks = scales.float().repeat_interleave(8, dim=0).repeat_interleave(16, dim=1)
    expected = ((1 - 2 * sign.float()) * number * blocks).to(dtype)
    assert torch.equal(stack[1, 2:26].nan_to_num(7.0), expected.nan_to_num(7.0))
    assert expected.isnan().any()
    assert not stack[0].any()
    assert not stack[1, :2].any()
    assert not stack[1, 26:].any()


def test_experts_in_four_bits_among_weights_in_eight(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 48, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=5, num_experts_per_tok=2)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "stored")
    plain = load_file(tmp_path / "stored" / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, weight in plain.items():
        stored[name] = weight
        rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
        if ".experts." in name:
            codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
            exponents, scales = powers_of_two((rows, columns // 32))
            numbers = torch.stack([FP4[(codes % 16).long()], FP4[(codes // 16).long()]], dim=-1).flatten(-2)
            plain[name] = numbers * scales.repeat_interleave(32, dim=1)
            stored |= {name: codes.view(torch.int8), f"{name}_scale_inv": exponents.view(torch.float8_e8m0fnu)}
        elif "_proj" in name:
            grid = (-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
            stored[name] = weight.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"], scales = stored_scales("e8m0", grid)
            plain[name] = stored[name].float() * in_blocks(scales, weight.shape)
    for made, path in ((stored, tmp_path / "stored"), (plain, tmp_path / "plain")):
        path.mkdir(exist_ok=True)
        save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text((tmp_path / "stored" / "config.json").read_text())
    say_quantised(tmp_path / "stored", {**FP8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"})
    assert_same_model(tmp_path / "stored", tmp_path / "plain")


def test_mxfp4(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        head_dim=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path / "stored")
    plain = load_file(tmp_path / "stored" / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, weight in plain.items():
        stored[name] = weight
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = weight.shape
            blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
            pairs = torch.stack([FP4[(blocks % 16).long()], FP4[(blocks // 16).long()]], dim=-1)  # low bits come first
            numbers = pairs.flatten(-2) * 2.0 ** (scales.float() - 127)[..., None]
            plain[name] = numbers.flatten(-2).transpose(1, 2).contiguous()
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for made, path in ((stored, tmp_path / "stored"), (plain, tmp_path / "plain")):
        path.mkdir(exist_ok=True)
        save_file(made, path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text((tmp_path / "stored" / "config.json").read_text())
    say_quantised(tmp_path / "stored", MXFP4)
    assert_same_model(tmp_path / "stored", tmp_path / "plain")


@pytest.mark.parametrize("form", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "mine"}])
def test_other_forms_are_refused(form: dict[str, Any], checkpoint: Path, opened: Open) -> None:
    say_quantised(checkpoint, form)
    with pytest.raises(UnsupportedModelError, match=rf"quantised \({form['quant_method']}\).* only fp8 in blocks and"):
        opened()


def test_scales_that_do_not_fit_are_said_when_it_is_opened(saved_family: SaveFamily) -> None:
    folder, _ = saved_family("deepseek_v3")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    stored[f"{name}_scale_inv"] = torch.ones(7, 5)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    say_quantised(folder, FP8)
    with pytest.raises(ValueError, match=r"cannot be made plain .*o_proj"):
        StreamedModel.from_pretrained(folder)
