"""UOE on quantised bases: what stays in full precision is edited as usual, what does not is edited beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import build
from tests.tuner.conftest import base_state, make_config, randomise
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks, is_quantised
from uoe_peft.tuner import UOEConfig

# Not among the extras of `make test`: PEFT imports them wherever they are installed, and both talk when imported.
bnb = pytest.importorskip("bitsandbytes", reason="run `make test-quantization`", exc_type=ImportError)
torchao = pytest.importorskip("torchao.quantization", reason="run `make test-quantization`", exc_type=ImportError)

Logits = Callable[..., Tensor]
LISTED = "listed, router module"

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # says that it casts its inputs


def to_8bit_linear(model: nn.Module, *, inside: str) -> None:
    """Replace the linear modules whose path contains a word by bitsandbytes' 8-bit ones."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and inside in name:
            small = bnb.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
            )
            small.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
            small.bias = linear.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, small)
    model.to("cpu")  # bitsandbytes quantises when weights are moved


def to_float8_experts(model: PreTrainedModel) -> None:
    """Store every experts stack as torchao's Float8Tensor; grouped kernels do not take these on CPU."""
    model.set_experts_implementation("eager")
    for block in find_moe_blocks(model):
        for projection in block.storage.projections:
            stack = getattr(block.storage.module, projection)
            small = nn.Parameter(torchao.Float8Tensor.from_hp(stack.detach()), requires_grad=False)
            setattr(block.storage.module, projection, small)


@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit", "torchao int8"])
def test_experts_that_stay_in_full_precision_merge_as_usual(qwen: PreTrainedModel, logits: Logits, kind: str) -> None:
    model = qwen.to(torch.float16 if kind == "bitsandbytes 8-bit" else torch.bfloat16)
    if kind == "bitsandbytes 8-bit":
        to_8bit_linear(model, inside="self_attn")
    else:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert any(is_quantised(parameter) for parameter in model.parameters())
    before = logits(model)
    model = get_peft_model(model, make_config(model))
    assert torch.equal(logits(model), before)
    randomise(model)
    forgets = logits(model)
    assert not torch.equal(forgets, before)
    experts = find_moe_blocks(model)[-1].storage.module
    slices = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), forgets, rtol=0.05, atol=0.05)
    model.unmerge_adapter()
    assert all(torch.equal(parameter, slices[name]) for name, parameter in experts.named_parameters())
    assert torch.equal(logits(model), forgets)


def test_float8_experts_are_dequantised_beside_the_base_path(qwen: PreTrainedModel, logits: Logits) -> None:
    qwen.to(torch.bfloat16)
    to_float8_experts(qwen)
    before = logits(qwen)
    model = get_peft_model(qwen, make_config(qwen))
    assert torch.equal(logits(model), before)
    randomise(model)
    assert not torch.equal(logits(model), before)
    model(input_ids=torch.randint(3, 50, (3, 11))).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match=r"cannot merge into .*_proj of Qwen2MoeExperts: it is quantised \(Float8"):
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)  # nor has the router been merged


def test_experts_quantised_one_by_one(logits: Logits) -> None:
    model = build(LISTED).half()
    to_8bit_linear(model, inside="experts.")
    before = logits(model)
    model = get_peft_model(model, make_config(model))
    assert torch.equal(logits(model), before)
    randomise(model)
    assert not torch.equal(logits(model), before)
    with pytest.raises(RuntimeError, match=r"cannot merge into weight of Linear8bitLt: it is quantised"):
        model.merge_adapter()


def test_listed_experts_take_the_delta_exactly(logits: Logits) -> None:
    base = build(LISTED)
    edited = copy.deepcopy(base)
    model = get_peft_model(base, make_config(base, train_router=False))
    randomise(model)
    state = base_state(model.get_base_model())
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, state[name])}
    assert changed and all(".experts.1." in name for name in changed)
    edited.load_state_dict(merged)
    torch.testing.assert_close(logits(model), logits(edited), rtol=1e-4, atol=1e-5)


def test_zero_expert_of_listed_experts(logits: Logits) -> None:
    base = build(LISTED)
    silenced = copy.deepcopy(base)
    block = find_moe_blocks(silenced)[-1]
    block.storage.weight(block.storage.projections[-1], 1).data.zero_()
    model = get_peft_model(base, make_config(base, init_weights="zero_expert", train_router=False))
    torch.testing.assert_close(logits(model), logits(silenced), rtol=1e-4, atol=1e-5)


def test_weights_whose_scales_lie_elsewhere_are_refused(qwen: PreTrainedModel) -> None:
    block = find_moe_blocks(qwen)[-1]
    stack = block.storage.module.down_proj
    block.storage.module.down_proj = nn.Parameter(stack.detach().to(torch.float8_e4m3fn), requires_grad=False)
    config = UOEConfig(target_experts=[(block.layer_idx, 1)], init_weights="zero_expert")
    with pytest.raises(UnsupportedModelError, match=r"stored as torch.float8_e4m3fn, with their scales elsewhere"):
        get_peft_model(qwen, config)
