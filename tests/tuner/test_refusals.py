"""What an adapter cannot reach is refused when it is put on, or when it would be passed by."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel

from tests.families import build, token_ids
from tests.families import logits as family_logits
from tests.tuner.conftest import hand_edited, make_config, randomise
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.tuner import UOEConfig, UOELayer

Logits = Callable[..., Tensor]


def test_offloaded_weights_are_refused_at_injection(qwen: PreTrainedModel) -> None:
    offloaded = cpu_offload(qwen, execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"cannot edit model.layers.\d.mlp.experts .* are offloaded"):
        get_peft_model(offloaded, make_config(build("qwen2_moe")))
    assert not any(isinstance(module, UOELayer) for module in qwen.modules())


@pytest.mark.parametrize("owner", ["", "model", "model.layers", "model.layers.2", "model.layers.2.mlp", "experts"])
def test_weights_that_a_hook_of_any_parent_brings_in_are_offloaded(qwen: PreTrainedModel, owner: str) -> None:
    config = make_config(qwen)
    experts = find_moe_blocks(qwen)[-1].experts.to("meta")
    holder = experts if owner == "experts" else qwen.get_submodule(owner)
    holder._hf_hook = types.SimpleNamespace(hooks=[types.SimpleNamespace(), types.SimpleNamespace(offload=True)])
    with pytest.raises(UnsupportedModelError, match=r"cannot edit model.layers.2.mlp.experts .* are offloaded"):
        get_peft_model(qwen, config)
    del holder._hf_hook
    model = get_peft_model(qwen, config)  # a model without weights, as for counting parameters
    assert not any(p.is_meta for name, p in model.named_parameters() if ".uoe_" in name)


def test_whole_weights_can_be_edited_whatever_hooks_there_are(qwen: PreTrainedModel) -> None:
    qwen.model._hf_hook = types.SimpleNamespace(offload=True)
    assert isinstance(find_moe_blocks(get_peft_model(qwen, make_config(qwen)))[-1].experts, UOELayer)


def test_the_first_layer_that_differs_is_named(qwen: PreTrainedModel) -> None:
    config = UOEConfig(target_experts=[(1, 0), (2, 0)], r=3)
    experts = get_peft_model(copy.deepcopy(qwen), config).peft_config["default"].base_experts
    for layer in ("1", "2"):
        config.base_experts = {**experts, layer: {**experts[layer], "num_experts": 77}}
        message = rf"layer {layer} of .* has \{{'num_experts': 6.*expects \{{'num_experts': 77"
        with pytest.raises(ValueError, match=message):
            get_peft_model(copy.deepcopy(qwen), config)
    config.base_experts = {"2": experts["2"]}
    with pytest.raises(ValueError, match=r"layer 1 of .* the adapter expects None"):
        get_peft_model(copy.deepcopy(qwen), config)


def test_experts_and_layers_that_exist_are_named(qwen: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"has 6 experts, got expert_idx=6; use 0 to 5$"):
        get_peft_model(qwen, make_config(qwen, expert_idx=6))


def test_a_dispatched_model_is_edited_as_any_other(qwen: PreTrainedModel, logits: Logits) -> None:
    plain = copy.deepcopy(qwen)
    parts = {name: "cpu" for name, _ in qwen.model.layers.named_children()}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{name}": place for name, place in parts.items()}
    dispatched = dispatch_model(qwen, places, main_device="cpu", force_hooks=True)
    assert hasattr(find_moe_blocks(dispatched)[-1].router, "_hf_hook")  # its forward is bound to the module
    model = get_peft_model(dispatched, make_config(dispatched)).eval()
    randomise(model)
    expected = logits(hand_edited(plain, model, {"default": 1.0}))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["experts", "router"])
def test_sharded_weights_are_refused_at_injection(qwen: PreTrainedModel, name: str) -> None:
    block = find_moe_blocks(qwen)[-1]
    owner, parameter = (block.experts, "down_proj") if name == "experts" else (block.router, block.gate_name)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shards = distribute_tensor(getattr(owner, parameter).detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        setattr(owner, parameter, nn.Parameter(shards, requires_grad=False))
        with pytest.raises(UnsupportedModelError, match="sharded over processes"):
            get_peft_model(qwen, make_config(qwen))
    finally:
        torch.distributed.destroy_process_group()


def fused(block: nn.Module, hidden_states: Tensor) -> Tensor:
    """A block as fused kernels write it: it takes the weights, and calls neither router nor experts."""
    flat = hidden_states.flatten(0, 1)
    scores = (flat @ block.gate.weight.T).softmax(dim=-1)  # (T, E)
    up = torch.einsum("th,eih->tei", flat, block.experts.gate_up_proj)
    gate, up = up.chunk(2, dim=-1)
    out = torch.einsum("tei,ehi->teh", nn.functional.silu(gate) * up, block.experts.down_proj)
    return (scores[..., None] * out).sum(dim=1).view_as(hidden_states)


def test_kernels_that_read_weights_past_an_adapter_are_refused(qwen: PreTrainedModel, logits: Logits) -> None:
    plain = copy.deepcopy(qwen)
    for model in (plain, qwen):
        mlp = model.model.layers[-1].mlp
        mlp.forward = types.MethodType(fused, mlp)
    before = logits(plain)
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    with pytest.raises(RuntimeError, match=r"gate_up_proj of Qwen2MoeExperts was read past the adapters \['default'\]"):
        logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.merge_adapter()
    expected = logits(hand_edited(plain, model, {"default": 1.0}))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_moe", "granitemoe", "listed, router module"])
def test_matrices_read_from_a_wrapper_are_the_edited_ones(family: str) -> None:
    base = build(family)
    model = get_peft_model(base, make_config(base))
    randomise(model)
    block = find_moe_blocks(model)[-1]
    layers = {"router": (block.router, block.gate_name)}
    if family.startswith("listed"):
        layers["expert"] = (block.experts[1].down_proj, "weight")
    for layer, name in layers.values():
        own = layer.get_base_layer().get_parameter(name)
        delta = next(iter(layer.uoe_delta["default"].values()))[0]

        def read(layer: Any = layer, name: str = name) -> Any:
            for part in name.split("."):
                layer = getattr(layer, part)
            return layer

        torch.testing.assert_close(read(), own + delta)
        with model.disable_adapter():
            assert read() is own


def test_zero_expert_refuses_experts_with_biases(models: dict[str, PreTrainedModel]) -> None:
    for base in (copy.deepcopy(models["gpt_oss"]), build("nllb_moe")):
        with pytest.raises(ValueError, match=r"cannot silence the experts of .*: they have biases"):
            get_peft_model(base, make_config(base, init_weights="zero_expert"))


@pytest.mark.parametrize("projections", [None, ["up_proj", "down_proj"], ["gate_proj", "down_proj"]])
def test_zero_expert_silences_an_expert_of_three_modules(projections: list[str] | None) -> None:
    base, silenced = build("listed, router module"), build("listed, router module")
    down = find_moe_blocks(silenced)[-1].experts[1].down_proj.weight.data
    original = down.clone()
    down.zero_()
    choice = "".join("zero_expert")  # equal to the code's own string, but another object
    options = {"init_weights": choice, "train_router": False, "target_projections": projections}
    model = get_peft_model(base, make_config(base, **options))
    for name, delta in model.named_parameters():
        if ".uoe_" in name:
            assert not delta.any() if "down_proj" not in name else torch.equal(delta[0], -original)
    torch.testing.assert_close(family_logits(model, token_ids()), family_logits(silenced, token_ids()))
    with pytest.raises(ValueError, match="needs 'down_proj' among target_projections"):
        get_peft_model(silenced, make_config(silenced, **options | {"target_projections": ["gate_proj", "up_proj"]}))


@pytest.mark.parametrize(("family", "last"), [("qwen2_moe", "down_proj"), ("dbrx", "w2")])
def test_zero_expert_takes_away_the_last_matrix_of_a_stack_alone(family: str, last: str) -> None:
    base = build(family)
    storage = find_moe_blocks(base)[-1].storage
    expected = {name: storage.weight(name, 1).clone() * (name == last) for name in storage.projections}
    model = get_peft_model(base, make_config(base, init_weights="zero_expert"))
    for name, delta in model.named_parameters():
        if ".experts." in name and ".uoe_" in name:
            torch.testing.assert_close(delta[0], -expected.pop(name.rpartition(".")[2]))
        elif ".uoe_" in name:
            assert not delta.any()
    assert not expected


def test_zero_expert_silences_what_lies_under_a_merged_adapter(qwen: PreTrainedModel, logits: Logits) -> None:
    silenced = copy.deepcopy(qwen)
    block = find_moe_blocks(silenced)[-1]
    block.storage.weight("down_proj", 1).data.zero_()
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # only after the new adapter was made
        model.add_adapter("silence", make_config(qwen, init_weights="zero_expert", train_router=False))
    model.set_adapter("silence")
    torch.testing.assert_close(logits(model), logits(silenced), rtol=1e-4, atol=1e-5)
