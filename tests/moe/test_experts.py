"""One expert can be read, written and computed alone, however its module stores it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.families import EXPERTS, SUPPORTED, build
from uoe_peft.moe import ListedExperts, find_moe_blocks
from uoe_peft.moe.experts import FlattenedExperts, StackedExperts, expert_storage
from uoe_peft.moe.storage import ExpertStorage

EXPERT, TOKENS = 4, 7
LAYOUTS = {"dbrx": FlattenedExperts} | dict.fromkeys(
    ("switch_transformers", "nllb_moe", "listed, router module", "listed, linear router"), ListedExperts
)


def input_size(storage: ExpertStorage) -> int:
    first = storage.projections[0]
    return storage.weight(first, 0).shape[0 if storage.is_transposed(first) else 1]


def run_one_expert(storage: ExpertStorage, hidden_states: Tensor) -> Tensor:
    """What the module itself makes of tokens that are all routed to one expert, and to another with weight 0."""
    module = storage.module
    if isinstance(storage, ListedExperts):
        return list(module.children())[EXPERT](hidden_states)
    if type(module).__name__ == "Llama4TextExperts":  # all tokens for every expert
        every = torch.zeros(EXPERTS, *hidden_states.shape).index_fill(0, torch.tensor([EXPERT]), 1) * hidden_states
        return module(every.flatten(0, 1)).unflatten(0, (EXPERTS, -1))[EXPERT]
    index = torch.tensor([[EXPERT, EXPERT - 1]]).expand(TOKENS, -1)
    return module(hidden_states, index, torch.tensor([[1.0, 0.0]]).expand(TOKENS, -1)).reshape(TOKENS, -1)


@pytest.mark.parametrize("family", SUPPORTED)
def test_one_expert_is_computed_as_its_module_does(family: str) -> None:
    storage = find_moe_blocks(build(family))[-1].storage
    assert type(storage) is LAYOUTS.get(family, StackedExperts)
    hidden_states = torch.randn(TOKENS, input_size(storage))
    weights = {projection: storage.weight(projection, EXPERT) for projection in storage.projections}
    with torch.no_grad():
        alone = storage.forward_expert(hidden_states, EXPERT, weights)
        torch.testing.assert_close(alone, run_one_expert(storage, hidden_states))
        assert not torch.allclose(storage.forward_expert(hidden_states, EXPERT - 1, other(storage)), alone)


def other(storage: ExpertStorage) -> dict[str, Tensor]:
    return {projection: storage.weight(projection, EXPERT - 1) for projection in storage.projections}


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "nemotron_h", "longcat_flash", *LAYOUTS])
def test_writing_to_a_weight_edits_that_expert_and_no_other(family: str) -> None:
    model = build(family)
    storage = find_moe_blocks(model)[-1].storage
    for projection in storage.projections:
        before = [storage.weight(projection, e).clone() for e in range(EXPERTS)]
        with torch.no_grad():
            storage.weight(projection, EXPERT).add_(1)
        after = [storage.weight(projection, e) for e in range(EXPERTS)]
        changed = [not torch.equal(b, a) for b, a in zip(before, after, strict=True)]
        assert changed == [e == EXPERT for e in range(EXPERTS)]


def test_layouts_tell_which_way_their_matrices_lie() -> None:
    for family, transposed in {"qwen2_moe": False, "gpt_oss": True, "llama4": True, "nemotron_h": False}.items():
        storage = find_moe_blocks(build(family))[-1].storage
        assert [storage.is_transposed(name) for name in storage.projections] == [transposed, transposed]
    storage = find_moe_blocks(build("dbrx"))[-1].storage
    assert [storage.is_transposed(name) for name in storage.projections] == [False, False, True]


@pytest.fixture
def stacked() -> ExpertStorage:
    return find_moe_blocks(build("qwen2_moe"))[-1].storage


@pytest.mark.parametrize("num_keywords", [0, 1, 3])
def test_routed_tokens_of_the_common_contract(stacked: ExpertStorage, num_keywords: int) -> None:
    hidden_states = torch.randn(4, 32)
    values = {
        "hidden_states": hidden_states,
        "top_k_index": torch.tensor([[0, 4], [1, 2], [4, 3], [0, 5]]),
        "top_k_weights": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6], [0.7, 0.8]]),
    }
    names = list(values)[3 - num_keywords :] if num_keywords else []
    args = tuple(value for name, value in values.items() if name not in names)
    kwargs = {name: values[name] for name in names}
    tokens = stacked.routed_tokens(4, args, kwargs)
    assert tokens.token.tolist() == tokens.row.tolist() == [0, 2]
    assert torch.equal(tokens.hidden_states, hidden_states[[0, 2]])
    torch.testing.assert_close(tokens.weight, torch.tensor([[0.2], [0.5]]))
    assert stacked.num_tokens(args, kwargs) == 4


def test_routed_tokens_of_the_dense_contract() -> None:
    storage = find_moe_blocks(build("llama4"))[-1].storage
    every = torch.randn(EXPERTS, 5, 32)
    every[EXPERT, [0, 3]] = 0  # these tokens are not routed to the expert
    args = (every.flatten(0, 1),)
    tokens = storage.routed_tokens(EXPERT, args, {})
    assert tokens.token.tolist() == [1, 2, 4]
    assert tokens.row.tolist() == [EXPERT * 5 + token for token in (1, 2, 4)]
    assert torch.equal(tokens.hidden_states, every[EXPERT, [1, 2, 4]])
    assert torch.equal(tokens.weight, torch.ones(3, 1))
    assert storage.num_tokens(args, {}) == 5


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 32))


def test_a_list_of_experts_may_hold_a_dropout() -> None:
    storage = expert_storage(nn.ModuleDict({"dropout": nn.Dropout(), "expert_0": mlp(), "expert_1": mlp()}))
    assert isinstance(storage, ListedExperts)
    assert storage.num_experts == 2
    assert storage.projections == ("0", "2")
    assert storage.linear_name("2", 1) == "expert_1.2"


@pytest.mark.parametrize(
    "module",
    [
        nn.ModuleList([mlp()]),
        nn.ModuleList([mlp(), nn.Linear(32, 24)]),
        nn.ModuleList([nn.Linear(32, 24), nn.Linear(32, 24)]),
        nn.Linear(32, 24),
    ],
    ids=["one", "two kinds", "single linear layers", "linear"],
)
def test_other_modules_hold_no_experts(module: nn.Module) -> None:
    assert expert_storage(module) is None


def test_shared_experts_in_three_stacks_are_not_routed_ones() -> None:
    module = nn.Module()
    for name, shape in {"gate_proj": (2, 24, 32), "up_proj": (2, 24, 32), "down_proj": (2, 32, 24)}.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert expert_storage(module) is None


@pytest.mark.parametrize(("norm", "has_bias"), [(nn.LayerNorm(5), True), (nn.RMSNorm(5), False)])
def test_what_a_zero_matrix_leaves_of_an_expert_is_known(norm: nn.Module, has_bias: bool) -> None:
    module = nn.Module()
    module.up_proj, module.down_proj = nn.Parameter(torch.ones(3, 4, 5)), nn.Parameter(torch.zeros(3, 5, 4))
    module.act_fn, module.has_gate, module.has_post_expert_norm = nn.ReLU(), False, True
    module.post_expert_norm = norm
    if has_bias:
        nn.init.ones_(norm.bias)
    storage = expert_storage(module)
    weights = {name: storage.weight(name, 1) for name in storage.projections}
    said = storage.forward_expert(torch.ones(2, 5), 1, weights)
    assert storage.has_output_bias is has_bias is bool(said.any())
