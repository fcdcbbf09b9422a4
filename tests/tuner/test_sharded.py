"""Which sharded weights can be edited: told from the tensors, in one process that is a group by itself.

What then happens in several processes: tests/training/test_engines.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.families import build
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.tuner import UOEConfig
from uoe_peft.tuner.model import _reshard
from uoe_peft.tuner.targets import Target, _check_engine, _why_not_sharded, find_targets

PATH = "model.layers.1.mlp"
PLAN, PARTS, STACKED = "split by a plan of their own", "adds up the parts", "not stacked"


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)


def shard(module: nn.Module, placed: DeviceMesh) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            split = distribute_tensor(parameter.detach(), placed, [Shard(0)] * placed.ndim)
            setattr(owner, name, nn.Parameter(split))


@pytest.fixture
def loaded_sharded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Whether a model counts as one whose weights transformers has sharded while it loaded them."""

    def say(model: nn.Module, answer: bool = True) -> None:
        monkeypatch.setattr(type(model), "is_distributed_loading_by_transformers", answer)

    return say


def targets_of(model: Any) -> dict[str, Target]:
    return {
        path.removeprefix(f"{PATH}."): t for path, t in find_targets(UOEConfig(target_experts=[(1, 2)]), model).items()
    }


@pytest.mark.parametrize(
    ("names", "managed", "patched", "router", "experts"),
    [
        (("fsdp",), False, False, None, None),
        (("dp_replicate", "fsdp"), False, False, None, None),
        (("tp",), False, False, PLAN, PARTS),
        (("fsdp", "tp"), False, False, PLAN, PARTS),
        (("tp",), False, True, PLAN, None),  # a plan replaced the experts' forward: the parts meet inside
        (("fsdp",), True, False, PLAN, PARTS),
    ],
)
@pytest.mark.usefixtures("group")
def test_what_a_layer_holds_can_be_edited_and_what_a_plan_splits_cannot(
    qwen, loaded_sharded, names, managed, patched, router, experts
) -> None:
    targets = targets_of(qwen)
    loaded_sharded(qwen)
    for kind, expected in (("gate", router), ("experts", experts)):
        module = qwen.get_submodule(f"{PATH}.{kind}")
        shard(module, mesh(*names)) if not managed else fully_shard(module, mesh=mesh(*names))
        if patched:
            module.forward = module.forward
        reason = _why_not_sharded(targets[kind], module, qwen)
        assert reason is None if expected is None else expected in str(reason)


@pytest.mark.usefixtures("group")
def test_a_mesh_without_names_is_taken_for_one_of_layers(qwen, loaded_sharded) -> None:
    target = targets_of(qwen)["gate"]
    loaded_sharded(qwen)
    module = qwen.get_submodule(f"{PATH}.gate")
    shard(module, DeviceMesh("cpu", [0]))
    assert _why_not_sharded(target, module, qwen) is None


@pytest.mark.parametrize("family", ["listed, router module", "dbrx"])
@pytest.mark.usefixtures("group")
def test_experts_that_are_not_stacked_are_not_edited_once_they_are_sharded(family, loaded_sharded) -> None:
    model = build(family)
    config = UOEConfig(target_experts=[(1, 2)], train_router=False)
    targets = find_targets(config, model)
    loaded_sharded(model)
    for path, target in targets.items():
        module = model.get_submodule(path)
        shard(module, mesh("fsdp"))
        assert STACKED in str(_why_not_sharded(target, module, model))


@pytest.mark.usefixtures("group")
def test_weights_that_transformers_did_not_shard_are_refused(qwen) -> None:
    shard(qwen.get_submodule(f"{PATH}.gate"), mesh("fsdp"))
    with pytest.raises(UnsupportedModelError, match=r"mlp\.gate .* sharded over processes: add the adapter before"):
        find_targets(UOEConfig(target_experts=[(1, 2)]), qwen)


@pytest.mark.parametrize(
    ("option", "value"),
    [("pp_size", 2), ("pp_size", 3), ("fsdp_cpu_offload", True), ("fsdp_mixed_precision", {"param_dtype": "bf16"})],
)
def test_engines_that_would_edit_different_things_are_refused_by_the_option(
    qwen, loaded_sharded, option, value
) -> None:
    plain = {"pp_size": 1, "fsdp_cpu_offload": False, "fsdp_mixed_precision": None}
    loaded_sharded(qwen)
    qwen.config.distributed_config = SimpleNamespace(**plain)
    _check_engine(qwen)
    qwen.config.distributed_config = SimpleNamespace(**plain | {option: value})
    with pytest.raises(UnsupportedModelError, match=rf"DistributedConfig\({option}=\.\.\.\)"):
        _check_engine(qwen)
    unknown = SimpleNamespace(config=qwen.config)  # of another library
    _check_engine(unknown)  # type: ignore[arg-type]
    loaded_sharded(qwen, False)  # the option is in the config of a checkpoint, no more
    _check_engine(qwen)


@pytest.mark.usefixtures("group")
def test_a_model_of_another_library_is_taken_for_one_that_was_sharded_by_hand(qwen) -> None:
    target, gate = targets_of(qwen)["gate"], qwen.get_submodule(f"{PATH}.gate")
    shard(gate, mesh("fsdp"))
    assert "add the adapter before fully_shard" in str(_why_not_sharded(target, gate, nn.Linear(2, 3)))


@pytest.mark.usefixtures("group")
def test_what_a_pass_has_left_whole_is_let_go_of() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    fully_shard(model, mesh=mesh("fsdp"), reshard_after_forward=False)
    model(torch.randn(4, 3))
    assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    _reshard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    _reshard(nn.Linear(2, 3))  # which nobody manages
