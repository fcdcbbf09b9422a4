"""Models, inputs and random adapters for the tests of the tuner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import build
from uoe_peft.moe import find_moe_blocks
from uoe_peft.tuner import UOEConfig, UOELayer

# Softmax and sigmoid routers, transposed and interleaved stacks with biases, a dense call contract.
FAMILIES = ("qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4", "olmoe")
DELTA_TYPES = ("full", "low_rank")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DELTA_TYPES)
def delta_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Models(dict[str, PreTrainedModel]):
    """One model a family, made when it is first asked for."""

    def __missing__(self, family: str) -> PreTrainedModel:
        return self.setdefault(family, build(family))


@pytest.fixture(scope="session")
def models() -> Models:
    """Shared by all tests, which take copies."""
    return Models()


@pytest.fixture
def base(models: dict[str, PreTrainedModel], family: str) -> PreTrainedModel:
    return copy.deepcopy(models[family])


@pytest.fixture
def qwen(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return copy.deepcopy(models["qwen2_moe"])


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(3, 50, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def config(base: PreTrainedModel, delta_type: str) -> UOEConfig:
    return make_config(base, delta_type=delta_type)


@pytest.fixture
def adapted(base: PreTrainedModel, config: UOEConfig) -> PeftModel:
    """A model with an adapter whose delta is random and large enough to be seen."""
    model = get_peft_model(base, config)
    randomise(model)
    return model.eval()


@pytest.fixture
def logits(input_ids: Tensor) -> Callable[[nn.Module], Tensor]:
    @torch.no_grad()
    def run(model: nn.Module, **kwargs: object) -> Tensor:
        return model(input_ids=input_ids, **kwargs).logits

    return run


def make_config(model: nn.Module, *, expert_idx: int = 1, **kwargs: object) -> UOEConfig:
    """A config for one expert of the model's last MoE layer."""
    layer_idx = find_moe_blocks(model)[-1].layer_idx
    return UOEConfig(**{"target_experts": [(layer_idx, expert_idx)], "r": 3, **kwargs})


def randomise(model: nn.Module, *, adapter_name: str = "default", seed: int = 0, std: float = 0.2) -> None:
    """Give every parameter of an adapter random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name and ".uoe_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


@torch.no_grad()
def hand_edited(base: nn.Module, model: nn.Module, factors: Mapping[str, float]) -> nn.Module:
    """A copy of a base model with an adapter model's stored deltas added to its weights, each times a factor.

    Low-rank deltas are multiplied out; the factor is all that scales them.
    """
    edited = copy.deepcopy(base)
    parts = zip(find_moe_blocks(edited), find_moe_blocks(model), strict=True)
    for own, wrapped in parts:
        router = own.router.get_parameter(own.gate_name)
        for layer, is_router in ((wrapped.experts, False), (wrapped.router, True)):
            for name, factor in factors.items():
                for projection, index, delta in stored_deltas(layer, name):
                    slice_ = router if is_router else own.storage.weight(projection, index)
                    turned = not is_router and name in layer.uoe_A and own.storage.is_transposed(projection)
                    slice_.add_(factor * (delta.T if turned else delta))
    return edited


def stored_deltas(layer: nn.Module, adapter_name: str) -> Iterator[tuple[str, int, Tensor]]:
    """Projection, expert and delta of an adapter in a layer, unscaled, read from its parameters; low-rank: `B @ A`."""
    if not isinstance(layer, UOELayer):
        return
    for place, index in enumerate(layer.target_indices.get(adapter_name, [])):
        if adapter_name in layer.uoe_delta:
            for projection, delta in layer.uoe_delta[adapter_name].items():
                yield projection, index, delta[place]
        else:
            for projection, factor in layer.uoe_A[adapter_name].items():
                yield projection, index, layer.uoe_B[adapter_name][projection][place] @ factor[place]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors that are not an adapter's, by their names without wrappers."""
    state = model.state_dict()
    return {name.replace(".base_layer", ""): t.clone() for name, t in state.items() if ".uoe_" not in name}
