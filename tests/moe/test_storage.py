"""A module computes with another weight, and never notices."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import substituted


class Router(nn.Module):
    """A router with a nested matrix, a bias as a buffer, and a count that it keeps of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4, bias=False)
        self.register_buffer("bias", torch.arange(4.0))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.layer(hidden_states) + self.bias


@pytest.fixture
def router() -> Router:
    return Router()


HIDDEN, OTHER = torch.randn(3, 5), torch.randn(4, 5)


def test_it_computes_with_the_other_weight_and_shares_the_rest(router: Router) -> None:
    seen: list[Tensor] = []
    router.register_forward_hook(lambda module, args, output: seen.append(output))
    router.layer.register_forward_hook(lambda module, args, output: seen.append(output))
    own = router.layer.weight
    before = own.clone()
    output = substituted(router, "layer.weight", OTHER)(HIDDEN)
    torch.testing.assert_close(output, HIDDEN @ OTHER.T + torch.arange(4.0))
    assert len(seen) == 2 and seen[1] is output
    assert router.layer.weight is own and torch.equal(own, before)
    assert router.calls == 1  # what a module keeps in buffers, it keeps
    router.bias.add_(1)
    torch.testing.assert_close(substituted(router, "layer.weight", OTHER)(HIDDEN), output + 1)


def test_gradients_reach_the_other_weight_alone(router: Router) -> None:
    router.requires_grad_(False)
    weight = OTHER.clone().requires_grad_()
    substituted(router, "layer.weight", weight)(HIDDEN).sum().backward()
    torch.testing.assert_close(weight.grad, HIDDEN.sum(dim=0).expand(4, 5))
    assert router.layer.weight.grad is None


def test_methods_on_the_instance_become_the_copys(router: Router) -> None:
    add_hook_to_module(router.layer, ModelHook())
    add_hook_to_module(router, ModelHook())
    expected = HIDDEN @ OTHER.T + torch.arange(4.0)
    torch.testing.assert_close(substituted(router, "layer.weight", OTHER)(HIDDEN), expected)

    def double(module: Any, hidden_states: Tensor) -> Tensor:
        return 2 * F.linear(hidden_states, module.weight)

    linear = nn.Linear(5, 4, bias=False)
    for method in (types.MethodType(double, linear), functools.partial(double, linear)):
        linear.forward = method
        torch.testing.assert_close(substituted(linear, "weight", OTHER)(HIDDEN), 2 * HIDDEN @ OTHER.T)
    linear.forward = lambda hidden_states: F.linear(hidden_states, linear.weight)
    with pytest.raises(UnsupportedModelError, match=r"the forward of a Linear was replaced by .*lambda"):
        substituted(linear, "weight", OTHER)


def test_a_compiled_module_is_not_called_in_its_copys_place(router: Router) -> None:
    router.layer.compile(backend="eager")
    router.compile(backend="eager")
    expected = HIDDEN @ OTHER.T + torch.arange(4.0)
    torch.testing.assert_close(substituted(router, "layer.weight", OTHER)(HIDDEN), expected)
