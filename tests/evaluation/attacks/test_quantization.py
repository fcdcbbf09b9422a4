"""Few bits are few values a group, in every matrix that computes and in no other."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.evaluation.attacks.conftest import Recorder, adapted, as_it_was
from tests.families import build
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.evaluation.attacks import quantization
from uoe_peft.evaluation.attacks.quantization import round_trip


def rounded_by_hand(weight: Tensor, bits: int, size: int) -> Tensor:
    """One number after the other."""
    out = weight.clone()
    most = 2 ** (bits - 1) - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            group = weight[row, start : start + size].tolist()
            scale = max(abs(value) for value in group) / most
            for place, value in enumerate(group):
                out[row, start + place] = round(value / scale) * scale if scale else value
    return out


@pytest.mark.parametrize(("bits", "size"), [(8, 4), (4, 5), (4, 11), (2, 3), (3, 100)])
def test_a_matrix_is_rounded_group_by_group(bits: int, size: int) -> None:
    weight = torch.randn(3, 11, dtype=torch.float64).float()
    weight[1, :4] = 0
    expected = rounded_by_hand(weight, bits, size)
    torch.testing.assert_close(round_trip(weight, bits=bits, group_size=size), expected, atol=1e-6, rtol=1e-6)


def test_no_group_size_means_the_whole_row() -> None:
    weight = torch.randn(3, 11)
    expected = rounded_by_hand(weight, 4, 11)
    torch.testing.assert_close(round_trip(weight, bits=4, group_size=None), expected, atol=1e-6, rtol=1e-6)


def test_the_error_is_half_a_step_and_the_largest_stays() -> None:
    weight = torch.randn(5, 64)
    after = round_trip(weight, bits=8, group_size=16)
    largest = weight.view(5, 4, 16).abs().amax(-1, keepdim=True)
    assert ((after - weight).view(5, 4, 16).abs() <= largest / 127 / 2 * 1.0001).all()
    torch.testing.assert_close(after.view(5, 4, 16).abs().amax(-1, keepdim=True), largest)


# Embeddings, heads, routers; biases of single experts are matrices, too.
KEPT = re.compile(r"embed_tokens|wte|lm_head|router|\.gate\.weight$|_bias$")


# Stacks as (E, out, in), as (E, in, out) with biases, as blocks of rows, and as modules in a list.
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "dbrx", "listed, linear router", "listed, router module"])
def test_experts_and_linear_layers_are_rounded_and_nothing_else(family: str) -> None:
    model = build(family).eval()
    score = Recorder()
    with as_it_was(model):
        result = quantization(model, score=score, bits=4, group_size=7)
    after = dict(score.models[1].named_parameters())
    share = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or KEPT.search(name):
            assert torch.equal(after[name], parameter), name
            continue
        share += parameter.numel()
        matrices = _matrices(name, parameter, family)
        expected = [
            torch.cat([_rounded_columns(part) for part in matrix.split(7, dim=1)], dim=1) for matrix in matrices
        ]
        for matrix, hand in zip(_matrices(name, after[name], family), expected, strict=True):
            torch.testing.assert_close(matrix, hand, atol=1e-6, rtol=1e-5, msg=name)
    assert result.settings["share_of_weights"] == share / sum(p.numel() for p in model.parameters())
    assert result.name == "int4"


def _rounded_columns(part: Tensor) -> Tensor:
    """A group of columns in int4."""
    scale = part.abs().max(dim=1, keepdim=True).values / 7
    return torch.round(part / scale) * scale


def _matrices(name: str, parameter: Tensor, family: str) -> list[Tensor]:
    """Views of shape (out, in)."""
    parameter = parameter.detach()
    if family == "dbrx" and ".experts.mlp." in name:
        experts = parameter.view(6, -1, parameter.shape[-1])
        return [expert.T if name.endswith("w2") else expert for expert in experts]
    if parameter.dim() == 3:
        return [expert.T if family == "gpt_oss" else expert for expert in parameter]
    return [parameter]


def test_a_dense_model_is_rounded_too() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model(input_ids=torch.tensor([[1]]))
    score = Recorder(lambda call: {"forget_x": 0.0})
    quantization(model, score=score, bits=3, group_size=None)
    down = score.models[1].model.layers[0].mlp.down_proj.weight
    assert max(len(row.unique()) for row in down) <= 7
    assert torch.equal(score.models[1].lm_head.weight, model.lm_head.weight)


def test_a_small_delta_is_rounded_away(qwen: PreTrainedModel) -> None:
    """The danger that the attack is about: in int4 the unlearned model is the base again."""
    model = adapted(qwen, train_router=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".uoe_" in name:
                parameter *= 1e-7
    rounded = Recorder()
    quantization(model, score=rounded, bits=4)
    base = Recorder()
    quantization(qwen, score=base, bits=4)
    torch.testing.assert_close(rounded.logits[1], base.logits[1], atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_bfloat16() -> None:
    weight = torch.randn(4, 8).bfloat16()
    after = round_trip(weight, bits=8, group_size=None)
    assert after.dtype is torch.bfloat16
    torch.testing.assert_close(after.float(), rounded_by_hand(weight.float(), 8, 8), atol=1e-2, rtol=1e-2)


def test_a_failing_score_leaves_the_model_alone(qwen: PreTrainedModel) -> None:
    model = adapted(qwen)
    with as_it_was(model), pytest.raises(RuntimeError, match="the score fails"):
        quantization(model, score=Recorder(fail_at=1), bits=8)


@pytest.mark.parametrize(("bits", "group_size"), [(1, 4), (9, 4), (4, 0)])
def test_what_cannot_be_is_refused(qwen: PreTrainedModel, bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match=r"bits|group_size"):
        quantization(qwen, score=Recorder(), bits=bits, group_size=group_size)


def test_a_quantised_model_is_refused(qwen: PreTrainedModel) -> None:
    model = copy.deepcopy(qwen)
    query = model.model.layers[0].self_attn.q_proj
    query.weight = nn.Parameter(query.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        quantization(model, score=Recorder(), bits=4, before={"forget_x": 0.0})


def test_unknown_stacks_are_refused_and_not_skipped(qwen: PreTrainedModel) -> None:
    class Unknown(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.stack = nn.Parameter(torch.zeros(3, 4, 5))

    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(UnsupportedModelError):
        quantization(Unknown(config), score=Recorder(), bits=4, before={"forget_x": 0.0})
