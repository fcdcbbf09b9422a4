"""The claims of the method, on every Mixture-of-Experts family of the installed transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import SUPPORTED, build, logits, token_ids
from tests.tuner.conftest import base_state, randomise
from uoe_peft.moe import ListedExperts, MoEBlock, find_moe_blocks
from uoe_peft.tuner import UOEConfig

# Each quirk of gating, layout or call contract once: these run in every variant, the others in one.
VARIED = ("dbrx", "deepseek_v4", "gpt_oss", "llama4", "muse_spark", "nemotron_h", "switch_transformers", "zaya")

every_family_and_delta = pytest.mark.parametrize(
    ("family", "delta_type"), [(f, "full") for f in SUPPORTED] + [(f, "low_rank") for f in VARIED]
)
# Routers of switch_transformers and nllb_moe cast their matrix at every call, and so touch what is put in its place.
casting_routers = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@every_family_and_delta
def test_a_fresh_adapter_changes_no_bit(family: str, delta_type: str) -> None:
    base = frozen(family)
    with torch.no_grad():
        before = logits(base, token_ids())
        model = get_peft_model(base, config_of_all_blocks(base, delta_type=delta_type))
        assert before.isfinite().all()
        assert torch.equal(logits(model, token_ids()), before)


@every_family_and_delta
def test_only_tokens_routed_to_the_target_change(family: str, delta_type: str) -> None:
    base = frozen(family)
    target = find_target(base)
    before = experts_output(base, target.block)
    # Without the router's delta, so that the same tokens are routed to the target.
    model = get_peft_model(base, target.config(delta_type=delta_type, train_router=False))
    randomise(model)
    changed = (experts_output(model, target.block) != before).any(dim=-1)  # (T,)
    assert torch.equal(changed, target.routed)


@casting_routers
@every_family_and_delta
def test_only_the_slice_and_its_router_get_a_gradient(family: str, delta_type: str) -> None:
    base = build(family)
    target = find_target(base)
    model = get_peft_model(base, target.config(delta_type=delta_type))
    randomise(model)
    logits(model, token_ids()).square().mean().backward()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prefixes = tuple(f"base_model.model.{name}." for name in (target.block.experts_name, target.block.router_name))
    assert all(name.startswith(prefixes) and ".uoe_" in name for name in trainable)
    for name, parameter in model.named_parameters():
        if name in trainable:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@every_family_and_delta
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(family: str, delta_type: str) -> None:
    base = build(family)
    before = base_state(base)
    model = get_peft_model(base, config_of_all_blocks(base, delta_type=delta_type))
    randomise(model)
    with torch.no_grad():
        unmerged = logits(model, token_ids())
        model.merge_adapter()
        assert changed_tensors(before, model), "a merge writes to the base"
        torch.testing.assert_close(logits(model, token_ids()), unmerged, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert not changed_tensors(before, model)
        assert torch.equal(logits(model, token_ids()), unmerged)


@every_family_and_delta
def test_save_and_load_give_equal_logits(family: str, delta_type: str, tmp_path: Path) -> None:
    base = build(family)
    with torch.no_grad():
        before = logits(base, token_ids())
        model = get_peft_model(base, config_of_all_blocks(base, delta_type=delta_type))
        randomise(model)
        model.save_pretrained(str(tmp_path))
        saved = logits(model, token_ids())
        loaded = PeftModel.from_pretrained(build(family), tmp_path)
        assert torch.equal(logits(loaded, token_ids()), saved)
    assert not torch.allclose(saved, before)


# The installed nllb_moe calls its first two experts, whatever its router says.
@pytest.mark.parametrize("family", [family for family in SUPPORTED if family != "nllb_moe"])
def test_the_router_delta_is_on_the_matrix_that_routes(family: str) -> None:
    base = build(family)
    target = find_target(base)
    model = get_peft_model(base, target.config())
    before = routed_tokens(model, find_block(model, target.block.layer_idx))
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if name.startswith(f"base_model.model.{target.block.router_name}.uoe_"):
                matrix = target.block.router.get_parameter(target.block.gate_name)
                delta.copy_(-2 * matrix)  # what was the worst expert becomes the best
    assert not torch.equal(routed_tokens(model, find_block(model, target.block.layer_idx)), before)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "muse_spark", "nemotron_h", "deepseek_v4"])
def test_every_kernel_of_the_experts_is_followed(family: str, implementation: str) -> None:
    base = frozen(family)
    base.set_experts_implementation(implementation)
    with torch.no_grad():
        before = logits(base, token_ids())
        model = get_peft_model(base, config_of_all_blocks(base))
        assert torch.equal(logits(model, token_ids()), before)
        randomise(model)
        unmerged = logits(model, token_ids())
        model.merge_adapter()
        torch.testing.assert_close(logits(model, token_ids()), unmerged, rtol=1e-4, atol=1e-5)


@casting_routers
@pytest.mark.parametrize("family", VARIED)
def test_in_bfloat16_training_runs_and_ten_toggles_restore_every_bit(family: str) -> None:
    base = build(family, dtype=torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        fresh = logits(base, token_ids())  # first, because routers may cast themselves when they are called
        before = base_state(base)
        model = get_peft_model(base, config_of_all_blocks(base))
        assert torch.equal(logits(model, token_ids()), fresh)
    randomise(model, std=0.02)
    unmerged = logits(model, token_ids())
    unmerged.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for _ in range(10):
            model.merge_adapter()
            merged = logits(model, token_ids())
            model.unmerge_adapter()
    assert not changed_tensors(before, model)
    # Rounding may send a token to another expert: nearly all of the outputs agree.
    close = torch.isclose(merged.float(), unmerged.detach().float(), rtol=0.05, atol=0.1)
    assert close.float().mean() > 0.9


@dataclass(frozen=True)
class Target:
    """An expert, and which tokens reach it: bool, shape `(T,)`."""

    block: MoEBlock
    expert_idx: int
    routed: Tensor

    def config(self, **kwargs: Any) -> UOEConfig:
        return UOEConfig(target_experts=[(self.block.layer_idx, self.expert_idx)], r=3, **kwargs)


def frozen(family: str) -> PreTrainedModel:
    """A base model as PEFT leaves it: what needs a gradient decides how torch folds a batch, and so how it rounds."""
    return build(family).requires_grad_(False)


def find_target(model: nn.Module) -> Target:
    """In the last block, an expert that some tokens reach but not all; all, where there is no other."""
    block = find_moe_blocks(model)[-1]
    routed = routed_tokens(model, block)  # (E, T)
    share = routed.float().mean(dim=1)
    expert_idx = int(torch.where(share < 1, share, 0.5 * share).argmax())
    assert share[expert_idx] > 0
    return Target(block, expert_idx, routed[expert_idx])


def find_block(model: nn.Module, layer_idx: int) -> MoEBlock:
    (block,) = (block for block in find_moe_blocks(model) if block.layer_idx == layer_idx)
    return block


def config_of_all_blocks(model: nn.Module, **kwargs: Any) -> UOEConfig:
    return UOEConfig(target_experts={block.layer_idx: [0, 1] for block in find_moe_blocks(model)}, r=3, **kwargs)


@torch.no_grad()
def routed_tokens(model: nn.Module, block: MoEBlock) -> Tensor:
    """Which tokens reach which expert, as seen from outside: bool, shape `(E, T)`."""
    if isinstance(block.storage, ListedExperts):
        return _tokens_of_listed_experts(model, block, block.storage)
    with recorded(model, [block.experts_name]) as calls:
        logits(model, token_ids())
    ((args, _),) = calls[block.experts_name]
    if len(args) == 1:  # every expert has its own copy of all tokens, zero where it is not selected
        return args[0].unflatten(0, (block.num_experts, -1)).any(dim=-1)
    _, index, weights = args
    return torch.stack([((index == e) & (weights != 0)).any(dim=-1) for e in range(block.num_experts)])


def _tokens_of_listed_experts(model: nn.Module, block: MoEBlock, storage: ListedExperts) -> Tensor:
    parent = block.experts_name.rpartition(".")[0]
    first = storage.projections[0]
    experts = [f"{block.experts_name}.{storage.linear_name(first, e)}" for e in range(block.num_experts)]
    with recorded(model, [parent, *experts]) as calls:
        logits(model, token_ids())
    (((hidden_states, *_), _),) = calls[parent]
    tokens = hidden_states.flatten(0, -2)  # (T, H)
    # An expert without tokens may not be called at all.
    inputs = [torch.cat([tokens[:0], *(args[0] for args, _ in calls[name])]) for name in experts]  # (N, H) each
    return torch.stack([(tokens[:, None] == own[None]).all(dim=-1).any(dim=1) for own in inputs])


@torch.no_grad()
def experts_output(model: nn.Module, block: MoEBlock) -> Tensor:
    """What the experts of a layer put out. Shape `(T, ·)`."""
    name = find_block(model, block.layer_idx).experts_name
    if isinstance(block.storage, ListedExperts):
        name = name.rpartition(".")[0]
    with recorded(model, [name]) as calls:
        logits(model, token_ids())
    ((_, output),) = calls[name]
    flat = output.reshape(-1, output.shape[-1])  # (T, H), or (E * T, H)
    return flat.unflatten(0, (-1, token_ids().numel())).transpose(0, 1).flatten(1)


@contextmanager
def recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[tuple[tuple[Any, ...], Any]]]]:
    """Positional inputs and output of every call of the named modules."""
    calls: dict[str, list[tuple[tuple[Any, ...], Any]]] = {name: [] for name in names}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: calls[name].append((args, output))

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    yield calls
    for handle in handles:
        handle.remove()


def changed_tensors(before: dict[str, Tensor], model: nn.Module) -> list[str]:
    after = {name.removeprefix("base_model.model."): tensor for name, tensor in base_state(model).items()}
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
