"""Blocks are found by structure, in every family; what cannot be told apart is refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.diffusion_gemma import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.qwen3_omni_moe import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

from tests.families import EXPERTS, LAYERS, SUPPORTED, UNSUPPORTED, WHOLE, build, build_whole, tiny_config
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.tuner import UOEConfig, UOELayer

# Classes that the router knows beside the experts: shared experts, identity experts, a skip expert.
EXTRA_CLASSES = {"inkling": 2, "longcat_flash": 3, "zaya": 1}
# Layers with routed experts, where it is not all of them, or all but the first.
SPARSE_LAYERS = {"jamba": [1, 3], "nemotron_h": [1, 3]}


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_is_found(family: str) -> None:
    model = build(family)
    blocks = find_moe_blocks(model)
    layers = [block.layer_idx for block in blocks]
    assert layers == SPARSE_LAYERS[family] if family in SPARSE_LAYERS else layers in ([0, 1, 2], [1, 2])
    for block in blocks:
        assert block.experts is model.get_submodule(block.experts_name)
        assert block.router is model.get_submodule(block.router_name)
        assert f".{block.layer_idx}." in f".{block.experts_name}"
        assert block.num_experts == block.storage.num_experts == EXPERTS
        gate = block.router.get_parameter(block.gate_name)
        assert gate.shape == (EXPERTS + EXTRA_CLASSES.get(family, 0), block.hidden_size)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_families_without_readable_experts_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="ForCausalLM has no Mixture-of-Experts block that can be edited"):
        find_moe_blocks(build(family))


def test_a_dense_model_is_refused() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no Mixture-of-Experts block"):
        find_moe_blocks(LlamaForCausalLM(config))


@pytest.mark.parametrize("family", ["qwen2_moe", "dbrx", "listed, linear router"])
def test_blocks_are_the_same_under_peft_and_show_its_wrappers(family: str) -> None:
    base = build(family)
    plain = find_moe_blocks(base)
    model = get_peft_model(base, UOEConfig(target_experts=[(1, 3)]))
    wrapped = find_moe_blocks(model)
    assert [block.layer_idx for block in wrapped] == [block.layer_idx for block in plain]
    for before, after in zip(plain, wrapped, strict=True):
        assert model.get_submodule(after.experts_name) is after.experts
        assert after.router_name == f"base_model.model.{before.router_name}"
        assert after.gate_name == before.gate_name
        assert after.storage.module is before.storage.module
        assert isinstance(after.router, UOELayer) == (after.layer_idx == 1)


@pytest.mark.parametrize("family", WHOLE)
def test_the_language_model_is_found_inside_a_model_with_towers(family: str) -> None:
    alone, whole = find_moe_blocks(build(family)), find_moe_blocks(build_whole(family))
    assert [block.layer_idx for block in whole] == [block.layer_idx for block in alone]
    for part, block in zip(alone, whole, strict=True):
        assert block.experts_name == part.experts_name.replace("model.", "model.language_model.", 1)
        assert block.gate_name == part.gate_name


def test_the_vision_experts_of_a_layer_are_left_alone() -> None:
    names = [block.experts_name for block in find_moe_blocks(build("ernie4_5_vl_moe"))]
    assert names == [f"model.language_model.layers.{layer_idx}.mlp.text_moe.experts" for layer_idx in (1, 2)]


@pytest.mark.parametrize("family", ["switch_transformers", "nllb_moe"])
def test_of_an_encoder_and_a_decoder_the_decoder_is_meant(family: str) -> None:
    names = [block.experts_name for block in find_moe_blocks(build(family))]
    assert len(names) == LAYERS
    assert all("decoder." in name for name in names)


def test_experts_that_two_parts_of_a_model_share_are_refused() -> None:
    config = tiny_config(DiffusionGemmaConfig, {"text_config.global_head_dim": 16})
    with pytest.raises(UnsupportedModelError, match=r"the same experts in model\.decoder\S+ and in model\.encoder"):
        find_moe_blocks(DiffusionGemmaForBlockDiffusion(config))


class Experts(nn.Module):
    def __init__(self, num_experts: int = 5) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 2 * 24, 32))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, 32, 24))


class Layer(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module, **towers: nn.Module) -> None:
        super().__init__()
        self.text = nn.Module()
        self.text.layers = nn.ModuleList(layers)
        for name, tower in towers.items():
            self.add_module(name, tower)

    def get_decoder(self) -> nn.Module:
        return self.text


def mlp(hidden_size: int, intermediate_size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden_size, intermediate_size), nn.Linear(intermediate_size, hidden_size))


def test_a_tower_with_experts_is_not_the_decoder_even_in_layers_that_the_decoder_has_dense() -> None:
    dense, sparse = Layer(mlp=mlp(32, 56)), Layer(experts=Experts(), gate=nn.Linear(32, 5))
    tower = Layer(blocks=nn.ModuleList([Layer(experts=Experts(), gate=nn.Linear(32, 5))]))
    blocks = find_moe_blocks(Model(dense, sparse, tower=tower))
    assert [block.experts_name for block in blocks] == ["text.layers.1.experts"]


@pytest.mark.parametrize("router_name", ["router", "gate", "switch"])
def test_a_neighbour_with_as_many_rows_is_no_router(router_name: str) -> None:
    neighbours = {"per_layer_input_up": nn.Linear(32, 5), "shared_expert": mlp(32, 5)}
    router = nn.Linear(32, 5, bias=False)
    (block,) = find_moe_blocks(Model(Layer(experts=Experts(), **neighbours, **{router_name: router})))
    assert block.router_name == f"text.layers.0.{router_name}"


def test_what_is_called_a_router_goes_before_what_is_called_a_gate() -> None:
    router = nn.Sequential(nn.Linear(32, 40), nn.Linear(40, 5))
    layer = Layer(per_layer_input_gate=nn.Linear(32, 5), experts=Experts(), router=router)
    (block,) = find_moe_blocks(Model(layer))
    assert (block.router_name, block.hidden_size) == ("text.layers.0.router", 40)


@pytest.mark.parametrize(("hidden", "classes"), [(5, 6), (8, 5), (7, 7)])
def test_the_last_matrix_of_a_router_gives_its_logits(hidden: int, classes: int) -> None:
    router = nn.Sequential(nn.Linear(32, hidden), nn.GELU(), nn.Linear(hidden, classes))
    (block,) = find_moe_blocks(Model(Layer(experts=Experts(), router=router)))
    assert (block.gate_name, block.hidden_size) == ("2.weight", hidden)


def test_a_list_of_mlps_needs_something_that_is_called_a_router() -> None:
    stages = nn.ModuleList([mlp(32, 24) for _ in range(5)])
    with pytest.raises(UnsupportedModelError, match="Model has no Mixture-of-Experts block"):
        find_moe_blocks(Model(Layer(stages=stages, projection=nn.Linear(32, 5))))
    (block,) = find_moe_blocks(Model(Layer(stages=stages, gate=nn.Linear(32, 5))))
    assert block.num_experts == 5


def test_experts_without_a_router_are_refused_only_where_no_others_are() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no router beside text\.layers\.0\.experts of Model"):
        find_moe_blocks(Model(Layer(experts=Experts())))
    (block,) = find_moe_blocks(Model(Layer(shared=Experts(2), experts=Experts(), gate=nn.Linear(32, 5))))
    assert block.experts_name == "text.layers.0.experts"


def test_two_blocks_in_a_layer_are_refused() -> None:
    block = {name: Layer(experts=Experts(), gate=nn.Linear(32, 5)) for name in ("first", "second")}
    with pytest.raises(UnsupportedModelError, match=r"several .*0\.first\.experts, text\.layers\.0\.second\.experts"):
        find_moe_blocks(Model(Layer(**block)))


def test_a_listener_and_a_talker_with_experts_are_refused() -> None:
    overrides = {
        "talker_config.text_config.shared_expert_intermediate_size": 40,
        "talker_config.spatial_merge_size": 2,
    }
    with torch.device("meta"):
        model = Qwen3OmniMoeForConditionalGeneration(tiny_config(Qwen3OmniMoeConfig, overrides))
    with pytest.raises(UnsupportedModelError, match=r"several .*talker\.model\.layers\.0.*thinker\.model"):
        find_moe_blocks(model)


def test_a_block_outside_any_layer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cannot tell the decoder layer of experts"):
        find_moe_blocks(Layer(experts=Experts(), gate=nn.Linear(32, 5)))
