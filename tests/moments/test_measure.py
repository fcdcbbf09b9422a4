"""Moments against sums over tokens that the test takes from the model's own code, by family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.families import build
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.routing import record_routing
from uoe_peft.moments import ROUTER, Moments, SliceName, measure_moments

# Softmax and sigmoid routers, transposed stacks with biases and interleaved gates, flattened ones, a dense contract,
# experts without a gate, experts in a list.
FAMILIES = (
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "dbrx",
    "llama4",
    "nemotron_h",
    "listed, router module",
    "listed, linear router",
)


def batch() -> dict[str, Tensor]:
    """Two rows of which the second ends in padding, which the mask leaves out."""
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def gram(rows: Tensor) -> Tensor:
    return torch.einsum("ti,tj->ij", rows.double(), rows.double()) / len(rows)


@pytest.mark.filterwarnings("ignore:fewer tokens of the retain set")
def test_qwen_moments_are_the_sums_over_routed_tokens() -> None:
    model, data = build("qwen2_moe"), batch()
    block = find_moe_blocks(model)[-1]
    experts: Any = block.experts
    captured: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda module, args: captured.append(args))
    with torch.no_grad():
        model(**data)
    handle.remove()
    hidden, index, weights = captured[0]
    moments = measure_moments(model, [data], [(block.layer_idx, 4)])
    rows, outputs, token_count = [], [], 0
    for t in torch.where(data["attention_mask"].flatten() == 1)[0].tolist():
        for k in range(index.shape[1]):
            if index[t, k] == 4:
                gate, up = (experts.gate_up_proj[4].detach() @ hidden[t]).chunk(2)
                rows.append(weights[t, k] * hidden[t])
                outputs.append(weights[t, k] * nn.functional.silu(gate) * up)
                token_count += 1
    x = moments.slices[SliceName(block.layer_idx, 4, "gate_up_proj")]
    h = moments.slices[SliceName(block.layer_idx, 4, "down_proj")]
    router = moments.slices[SliceName(block.layer_idx, None, ROUTER)]
    torch.testing.assert_close(x.second.double(), gram(torch.stack(rows)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(h.second.double(), gram(torch.stack(outputs)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(h.mean, torch.stack(outputs).mean(dim=0), rtol=1e-5, atol=1e-7)
    real = data["attention_mask"].flatten().bool()
    torch.testing.assert_close(router.second.double(), gram(hidden[real]), rtol=1e-5, atol=1e-7)
    assert (x.num_tokens, h.num_tokens, router.num_tokens, moments.num_tokens) == (token_count, token_count, 15, 15)


@pytest.mark.filterwarnings("ignore:fewer tokens of the retain set")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_delta_changes_the_layer_as_the_moments_say(family: str) -> None:
    """The squared change of the layer's output by a delta of the last matrix is `tr(Δ C Δᵀ) N`, whatever the layout."""
    model, data = build(family), batch()
    data["attention_mask"] = torch.ones_like(data["attention_mask"])
    block = find_moe_blocks(model)[-1]
    storage, projection = block.storage, block.storage.projections[-1]
    expert_idx = busiest(model, block.layer_idx, data)
    moments = measure_moments(model, [data], [(block.layer_idx, expert_idx)], routers=False)
    found = moments.slices[SliceName(block.layer_idx, expert_idx, projection)]
    rows, columns = storage.shape(projection)
    assert rows != columns
    stored = torch.randn(rows, columns)
    delta = stored.T if storage.is_transposed(projection) else stored  # (out, in)
    assert found.dimension == delta.shape[1]
    before = block_output(model, block, data)
    with torch.no_grad():
        storage.weight(projection, expert_idx).add_(stored)
    change = (block_output(model, block, data) - before).double()
    expected = torch.einsum("oi,ij,oj->", delta.double(), found.second.double(), delta.double()) * found.num_tokens
    torch.testing.assert_close(change.square().sum(), expected, rtol=2e-3, atol=1e-8)


def busiest(model: nn.Module, layer_idx: int, data: dict[str, Tensor]) -> int:
    with torch.no_grad(), record_routing(model, layer_indices=[layer_idx]) as trace:
        model(**data)
    return int(trace[layer_idx].top_k_index.flatten().bincount().argmax())


def block_output(model: nn.Module, block: Any, data: dict[str, Tensor]) -> Tensor:
    """What the experts of a block add up to, before whatever comes after them."""
    seen: list[Tensor] = []
    listed = isinstance(block.experts, nn.ModuleList)
    module = model.get_submodule(block.experts_name.rpartition(".")[0]) if listed else block.experts
    handle = module.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(**data)
    handle.remove()
    out = seen[0]
    return out.reshape(-1, out.shape[-1])


@pytest.mark.filterwarnings("ignore:fewer tokens of the retain set")
def test_two_batches_are_one_and_several_layers_take_one_pass() -> None:
    model, data = build("qwen2_moe"), batch()
    layers = [block.layer_idx for block in find_moe_blocks(model)]
    pairs = [(layer_idx, expert_idx) for layer_idx in layers for expert_idx in (1, 4)]
    rows = [{name: value[i : i + 1] for name, value in data.items()} for i in range(2)]
    whole, parts = measure_moments(model, [data], pairs), measure_moments(model, rows, pairs)
    assert whole.slices.keys() == parts.slices.keys() and len(whole.slices) == 5 * len(layers)
    for name, found in whole.slices.items():
        assert found.num_tokens == parts.slices[name].num_tokens
        torch.testing.assert_close(found.second, parts.slices[name].second, rtol=1e-4, atol=1e-6)


def test_nothing_above_the_layer_is_run() -> None:
    model = build("qwen2_moe")
    first, *_, last = find_moe_blocks(model)

    def fail(*_: object) -> None:
        raise AssertionError("ran")

    last.router.register_forward_pre_hook(fail)
    for linear in model.modules():
        if linear is getattr(model, "lm_head", None):
            linear.register_forward_pre_hook(fail)
    with pytest.warns(UserWarning, match=r"layer 0, expert 1, gate_up_proj \(4 of 32\).*down_proj \(4 of 24\)"):
        measure_moments(model, [batch()], [(first.layer_idx, 1)])


@pytest.mark.filterwarnings("ignore:fewer tokens of the retain set")
def test_modes_and_weights_stay() -> None:
    model = build("qwen2_moe").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_moments(model, [batch()], [(1, 1)])
    assert model.training and all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["qwen2_moe", "listed, router module"])
def test_an_expert_that_no_token_reaches_is_named(family: str) -> None:
    model, data = build(family), batch()
    block = find_moe_blocks(model)[-1]
    gate = block.router.get_parameter(block.gate_name)
    with torch.no_grad():
        gate.zero_()  # every token takes the same two experts
    unused = min(set(range(block.num_experts)) - used(model, block.layer_idx, data))
    with pytest.raises(ValueError, match=rf"none of the 15 tokens of the retain set reaches expert {unused} of layer"):
        measure_moments(model, [data], [(block.layer_idx, unused)])


def used(model: nn.Module, layer_idx: int, data: dict[str, Tensor]) -> set[int]:
    with torch.no_grad(), record_routing(model, layer_indices=[layer_idx]) as trace:
        model(**data)
    return set(trace[layer_idx].top_k_index.flatten().tolist())


def test_bad_input_is_named() -> None:
    model, data = build("qwen2_moe"), batch()
    with pytest.raises(ValueError, match="target_experts is empty"):
        measure_moments(model, [data], [])
    with pytest.raises(ValueError, match="got expert_idx=6; use 0 to 5"):
        measure_moments(model, [data], [(1, 6)])
    with pytest.raises(ValueError, match="routed experts in the layers"):
        measure_moments(model, [data], [(7, 1)])
    with pytest.raises(ValueError, match="the forget set has no tokens"):
        measure_moments(model, [], [(1, 1)], name="forget")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises((ValueError, UnsupportedModelError), match=r"NaN|none of the"):
        measure_moments(model, [data], [(1, 1)])


@pytest.mark.filterwarnings("ignore:fewer tokens of the retain set")
def test_moments_survive_a_file_and_nothing_else_does(tmp_path: Any) -> None:
    model = build("qwen2_moe")
    moments = measure_moments(model, [batch()], [(1, 1), (2, 4)])
    moments.save(tmp_path / "moments.safetensors")
    loaded = Moments.load(tmp_path / "moments.safetensors")
    assert loaded.num_tokens == moments.num_tokens and list(loaded.slices) == list(moments.slices)
    for name, found in moments.slices.items():
        assert torch.equal(found.second, loaded.slices[name].second) and torch.equal(
            found.mean, loaded.slices[name].mean
        )
        assert found.num_tokens == loaded.slices[name].num_tokens
    whole = (tmp_path / "moments.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        Moments.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match=r"expected a file that Moments\.save wrote"):
        Moments.load(tmp_path / "absent")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="of format None"):
        Moments.load(tmp_path / "foreign")
