"""Groups compute what the dense layers computed, and become them again bit for bit; other models are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from tests.dense.conftest import FAMILIES, GROUPS, HIDDEN, NEURONS, logits, make_groups, make_model, weights
from tests.families import build
from uoe_peft.dense import NeuronGroups, factorize, to_dense
from uoe_peft.dense.block import GroupedMLP
from uoe_peft.dense.layers import find_dense_layers
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.interventions import silence_expert
from uoe_peft.moe.routing import record_routing


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_differ_by_rounding_only(family: str, groups: NeuronGroups) -> None:
    model = make_model(family).double()
    before = logits(model)
    assert factorize(model, groups) is model
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_comes_back_bit_for_bit(family: str, groups: NeuronGroups) -> None:
    model = make_model(family)
    before, said, kind = weights(model), logits(model), type(model.model.layers[0].mlp)
    assert to_dense(factorize(model, groups)) is model
    after = weights(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), said)
    assert type(model.model.layers[0].mlp) is kind


def test_bfloat16_bits_come_back_and_logits_stay_near(groups: NeuronGroups) -> None:
    model = make_model().to(torch.bfloat16)
    before, said = weights(model), logits(model).float()
    factorize(model, groups)
    near = (logits(model).float() - said).abs().max()
    assert near <= 2**-6 * said.abs().max()
    after = weights(to_dense(model))
    assert all(torch.equal(after[name].view(torch.int16), before[name].view(torch.int16)) for name in before)


def test_each_group_holds_the_rows_and_columns_of_its_neurons(model: PreTrainedModel, groups: NeuronGroups) -> None:
    mlp = copy.deepcopy(model.model.layers[1].mlp)
    block = find_moe_blocks(factorize(model, groups))[1]
    assert (block.layer_idx, block.num_experts, block.hidden_size, block.gate_name) == (1, GROUPS, HIDDEN, None)
    for expert_idx in range(GROUPS):
        neurons = [n for n in range(NEURONS) if int(groups.by_layer[1][n]) == expert_idx]
        gate_up = block.storage.weight("gate_up_proj", expert_idx)
        assert torch.equal(gate_up, torch.cat([mlp.gate_proj.weight[neurons], mlp.up_proj.weight[neurons]]).T)
        assert torch.equal(block.storage.weight("down_proj", expert_idx), mlp.down_proj.weight[:, neurons].T)


@pytest.mark.parametrize("family", ["llama", "llama with biases", "gemma"])
def test_a_silenced_group_is_one_without_its_columns(family: str, groups: NeuronGroups) -> None:
    model = make_model(family).double()
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.model.layers[2].mlp.down_proj.weight[:, groups.by_layer[2] == 4] = 0
    block = find_moe_blocks(factorize(model, groups))[2]
    with silence_expert(block, 4):
        torch.testing.assert_close(logits(model), logits(edited), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama with biases", "gemma2"])
def test_scores_are_shares_of_what_neurons_write(family: str, groups: NeuronGroups) -> None:
    model = make_model(family)
    mlp = copy.deepcopy(model.model.layers[1].mlp)
    factorize(model, groups)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with record_routing(model) as trace:
        logits(model)
    handle.remove()
    x = seen[0].flatten(0, 1)
    neurons = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)  # (T, I)
    written = (neurons[:, None, :] * mlp.down_proj.weight).norm(dim=1)  # (T, I): what each neuron adds to the output
    by_group = torch.stack([written[:, groups.by_layer[1] == e].sum(dim=1) for e in range(GROUPS)], dim=1)
    torch.testing.assert_close(trace[1].scores, by_group / by_group.sum(dim=1, keepdim=True))
    assert torch.equal(trace[1].top_k_weights, torch.ones(18, GROUPS))
    assert trace[1].top_k_index.tolist() == [list(range(GROUPS))] * 18


def test_some_layers_alone_can_be_in_groups(model: PreTrainedModel) -> None:
    before = logits(model)
    factorize(model, NeuronGroups.random({1: NEURONS}, 4))
    assert [block.layer_idx for block in find_moe_blocks(model)] == [1]
    assert not isinstance(model.model.layers[0].mlp, GroupedMLP)
    torch.testing.assert_close(logits(model), before)


def test_nothing_is_held_twice(model: PreTrainedModel, groups: NeuronGroups) -> None:
    count = sum(p.numel() for p in model.parameters())
    factorize(model, groups)
    assert sum(p.numel() for p in model.parameters()) == count
    (emptied,) = model.model.layers[0].mlp._emptied
    assert all(p.is_meta for p in emptied.parameters())


def test_a_copy_becomes_dense_by_itself(model: PreTrainedModel, groups: NeuronGroups) -> None:
    before = weights(model)
    factorize(model, groups)
    other = to_dense(copy.deepcopy(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert find_moe_blocks(model)[0].num_experts == GROUPS
    assert all(p.is_meta for p in model.model.layers[0].mlp._emptied[0].parameters())


def test_modes_and_frozen_weights_stay(model: PreTrainedModel, groups: NeuronGroups) -> None:
    model.train().model.layers[1].mlp.requires_grad_(False)
    factorize(model, groups)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.model.layers[1].mlp.parameters()] == [False, False]
    assert all(p.requires_grad for p in model.model.layers[0].mlp.parameters())
    to_dense(model.eval())
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.model.layers[1].mlp.parameters()] == [False] * 3


def test_a_cast_in_between_is_kept(model: PreTrainedModel, groups: NeuronGroups) -> None:
    before = weights(model)
    after = weights(to_dense(factorize(model, groups).to(torch.float64)))
    assert all(torch.equal(after[name], before[name].double()) for name in before)


def test_a_factorized_model_is_not_saved_as_it_is(
    model: PreTrainedModel, groups: NeuronGroups, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    factorize(model, groups)
    with pytest.raises(ValueError, match="to_dense"):
        model.save_pretrained(folder)
    assert list(folder.iterdir()) == []
    to_dense(model).save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()


def test_groups_of_another_model_are_refused(model: PreTrainedModel) -> None:
    before = weights(model)
    with pytest.raises(ValueError, match=r"54 neurons in layer 0, LlamaForCausalLM has 48"):
        factorize(model, make_groups(neurons=54))
    with pytest.raises(ValueError, match="they name layer 7"):
        factorize(model, NeuronGroups.random({1: NEURONS, 7: NEURONS}, GROUPS))
    assert list(weights(model)) == list(before)


def test_what_is_factorized_is_not_factorized_again(model: PreTrainedModel, groups: NeuronGroups) -> None:
    factorize(model, groups)
    with pytest.raises(UnsupportedModelError, match="has experts already, 6 in layer 0"):
        factorize(model, groups)
    to_dense(model)
    with pytest.raises(ValueError, match="is not factorized"):
        to_dense(model)


def test_models_with_experts_are_refused(groups: NeuronGroups) -> None:
    with pytest.raises(UnsupportedModelError, match="UOE edits these"):
        factorize(build("qwen2_moe"), groups)


def test_other_feed_forward_modules_are_named() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97))
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.mlp is a GPT2MLP with .*'c_fc'"):
        find_dense_layers(gpt2)
    phi3 = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"is a Phi3MLP with .*'gate_up_proj'"):
        find_dense_layers(phi3)


def test_a_module_that_computes_something_else_is_refused(model: PreTrainedModel, groups: NeuronGroups) -> None:
    mlp = model.model.layers[2].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x) + 0.01 * x
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp: LlamaMLP computes something else"):
        factorize(model, groups)
    assert not any(isinstance(module, GroupedMLP) for module in model.modules())


@pytest.mark.parametrize("name", ["dropout", "act_fn"])
def test_a_module_with_other_parts_is_refused(model: PreTrainedModel, groups: NeuronGroups, name: str) -> None:
    if name == "dropout":
        model.model.layers[0].mlp.dropout = nn.Dropout()
    else:
        del model.model.layers[0].mlp.act_fn
    with pytest.raises(UnsupportedModelError, match=name):
        factorize(model, groups)


def test_shared_layers_are_refused(model: PreTrainedModel, groups: NeuronGroups) -> None:
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"same feed-forward weights in model\.layers\.0\.mlp"):
        factorize(model, groups)


def test_a_model_without_weights_is_put_into_groups(groups: NeuronGroups) -> None:
    with torch.device("meta"):
        model = type(make_model())(make_model().config)
    factorize(model, groups)
    assert {tuple(block.storage.shape("gate_up_proj")) for block in find_moe_blocks(model)} == {(32, 16)}
    assert all(p.is_meta for p in model.parameters())


def test_a_token_that_no_neuron_is_active_for_has_no_shares(model: PreTrainedModel, groups: NeuronGroups) -> None:
    factorize(model, groups)
    experts = model.model.layers[0].mlp.experts
    shares = experts.shares(torch.cat([torch.zeros(1, HIDDEN), torch.ones(1, HIDDEN)]))
    assert shares[0].tolist() == [0] * GROUPS
    assert shares[1].sum().item() == pytest.approx(1)


def test_offloaded_weights_are_refused(model: PreTrainedModel, groups: NeuronGroups) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="is offloaded"):
        factorize(model, groups)
