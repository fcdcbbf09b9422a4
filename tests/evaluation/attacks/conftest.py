"""Models under attack, and a witness that they come out as they went in."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import build, token_ids
from uoe_peft.tuner import UOEConfig, UOERouterLayer

TARGETS = [(1, 4), (1, 2)]


def perturb(model: PeftModel, *, std: float = 0.3, seed: int = 1) -> PeftModel:
    """Random deltas, large enough to be seen in logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".uoe_" in name or ".lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(base: PreTrainedModel, **options: Any) -> PeftModel:
    """A copy of a model with a random UOE adapter."""
    config = UOEConfig(target_experts=TARGETS, **options)
    return perturb(get_peft_model(copy.deepcopy(base), config)).eval()


def logits_of(model: nn.Module) -> Tensor:
    """Logits of fixed tokens."""
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def witness(model: nn.Module) -> dict[str, Any]:
    """All that an attack could leave changed."""
    found: dict[str, Any] = {f"tensor {name}": t.clone() for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found[f"grad {name}"] = (parameter.requires_grad, parameter.grad is None, parameter.dtype)
    for name, module in model.named_modules():
        found[f"module {name}"] = (
            type(module),
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            "forward" in module.__dict__,
        )
        if isinstance(scaling := module.__dict__.get("scaling"), dict):
            found[f"adapter {name}"] = (dict(scaling), list(module.active_adapters), module.disable_adapters)
    return found


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Asserts that the block leaves a model, and torch's random state, as they were."""
    before, random = witness(model), torch.get_rng_state()
    try:
        yield
    finally:
        after = witness(model)
        assert before.keys() == after.keys()
        for name, value in before.items():
            same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
            assert same, name
        assert torch.equal(random, torch.get_rng_state())


class Recorder:
    """A score that keeps what it was asked, and answers with what it is told or the logits' mean."""

    def __init__(self, answers: Callable[[int], Mapping[str, float]] | None = None, *, fail_at: int = -1) -> None:
        self.answers = answers
        self.fail_at = fail_at
        self.models: list[Any] = []
        self.logits: list[Tensor] = []
        self.asked: list[dict[str, Any]] = []

    def __call__(self, model: Any, **asked: Any) -> Mapping[str, float]:
        call = len(self.models)
        self.models.append(model)
        self.asked.append(asked)
        if call == self.fail_at:
            raise RuntimeError("the score fails")
        if self.answers is not None:
            return self.answers(call)
        self.logits.append(logits_of(model))
        return {"forget_x": float(self.logits[-1].std()), "retain_x": float(self.logits[-1].amax())}


@pytest.fixture(scope="session")
def qwen() -> PreTrainedModel:
    return build("qwen2_moe").eval()


@pytest.fixture
def quick_nanogcg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, where it is installed, without the garbage collections between its passes."""
    pytest.importorskip("nanogcg")
    monkeypatch.setattr(gc, "collect", lambda *args: 0)


def is_router(layer: nn.Module) -> bool:
    return isinstance(layer, UOERouterLayer)
