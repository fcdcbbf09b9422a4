"""The mean of several deltas against ordinary least squares on the tokens themselves, by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from tests.families import build
from tests.tuner.conftest import randomise
from uoe_peft.moments import Moments, SliceMoments, measure_moments
from uoe_peft.requests import add_regression_mean
from uoe_peft.requests.regression import regression_mean
from uoe_peft.tuner import UOEConfig, UOELayer

LOW_RANK = {"delta_type": "low_rank", "router_delta_type": "low_rank", "r": 3, "uoe_alpha": 6}


def tokens(number: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(rows: torch.Tensor) -> SliceMoments:
    return SliceMoments(rows.mean(dim=0).float(), rows.T @ rows / len(rows), len(rows))


def test_it_is_least_squares_over_all_tokens() -> None:
    first, second, retain = tokens(40, 5, 0), tokens(25, 5, 1) * 3, tokens(60, 5, 2)
    deltas = {"first": tokens(4, 5, 3), "second": tokens(4, 5, 4)}
    inputs = torch.cat([first, second, retain]).numpy()
    outputs = torch.cat([first @ deltas["first"].T, second @ deltas["second"].T, torch.zeros(60, 4)]).numpy()
    expected = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    known = {name: moments_of(rows) for name, rows in (("first", first), ("second", second), ("retain", retain))}
    found = regression_mean(deltas, known, ridge=1e-12)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=1e-8)


def test_tokens_that_share_no_direction_get_exactly_their_own_deltas() -> None:
    first, second = tokens(30, 6, 0), tokens(30, 6, 1)
    first[:, 3:], second[:, :3] = 0, 0
    deltas = {"first": tokens(2, 6, 2), "second": tokens(2, 6, 3)}
    found = regression_mean(deltas, {"first": moments_of(first), "second": moments_of(second)}, ridge=1e-12)
    torch.testing.assert_close(found[:, :3], deltas["first"][:, :3], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found[:, 3:], deltas["second"][:, 3:], rtol=1e-6, atol=1e-8)


def test_ridge_is_a_share_of_the_mean_eigenvalue() -> None:
    rows = torch.eye(4, dtype=torch.float64) * 2  # C = I, N = 4, so that N C has eigenvalue 4
    delta = tokens(3, 4, 0)
    torch.testing.assert_close(regression_mean({"a": delta}, {"a": moments_of(rows)}, ridge=0.25), delta / 1.25)


@pytest.mark.parametrize(("family", "options"), [("qwen2_moe", {}), ("qwen2_moe", LOW_RANK), ("gpt_oss", LOW_RANK)])
@pytest.mark.filterwarnings("ignore:fewer tokens of the")
def test_the_adapter_does_to_each_request_what_its_own_does(family: str, options: dict[str, Any]) -> None:
    model = get_peft_model(build(family), UOEConfig(target_experts=[(1, 1)], **options), adapter_name="a")
    model.add_adapter("b", UOEConfig(target_experts=[(1, 1), (1, 4)], **options))
    randomise(model, adapter_name="a")
    randomise(model, adapter_name="b", seed=1)
    experts = [(1, 1), (1, 4)]
    known = {}
    with model.disable_adapter():
        for place, name in enumerate(("a", "b", "retain")):
            ids = torch.randint(3, 90, (6, 17), generator=torch.Generator().manual_seed(place))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            known[name] = measure_moments(model, [batch], experts, strict=False)
    add_regression_mean(
        model, ["a", "b"], {n: known[n] for n in ("a", "b")}, "both", retain=known["retain"], ridge=0.01
    )
    checked = 0
    for layer in (module for module in model.modules() if isinstance(module, UOELayer)):
        router = len(layer.edited_keys(["b"])) == 1
        for projection, index in layer.edited_keys(["both"]):
            name = (1, None if router else index, "router" if router else projection)
            total = target = 0
            for request in ("a", "b", "retain"):
                moments = known[request].slices[name]
                second = moments.second.double() * moments.num_tokens
                total = total + second
                if request in layer.edited_keys(["a", "b"]).get((projection, index), []):
                    delta = layer.get_delta_weight(request, projection, index).double()
                    target = target + (delta.T if layer.is_transposed(projection) else delta) @ second
            damping = 0.01 * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
            expected = target @ torch.linalg.inv(total + damping)
            found = layer.get_delta_weight("both", projection, index).double()
            found = found.T if layer.is_transposed(projection) else found
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            checked += 1
    assert checked == 5  # the router, and two matrices of two experts


@pytest.mark.filterwarnings("ignore:fewer tokens of the")
def test_bad_input_leaves_the_model_as_it_was() -> None:
    model = get_peft_model(build("qwen2_moe"), UOEConfig(target_experts=[(1, 1)]), adapter_name="a")
    ids = torch.randint(3, 90, (6, 17), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own, elsewhere = (measure_moments(model, [batch], [pair]) for pair in ((1, 1), (2, 1)))
    narrow = Moments({name: moments_of(tokens(9, 3, 0)) for name in own.slices}, 9)
    still = Moments({n: SliceMoments(m.mean * 0, m.second * 0, 1) for n, m in own.slices.items()}, 1)
    for moments, options, message in (
        ({}, {}, r"no moments of the adapters \['a'\]"),
        ({"a": elsewhere}, {}, "the moments of .'a'. lack layer 1"),
        ({"a": narrow}, {}, "they are of another model"),
        ({"a": still}, {}, "put nothing into the slice"),
        ({"a": own}, {"ridge": 0.0}, "ridge must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            add_regression_mean(model, ["a"], moments, "mean", **options)
        assert set(model.peft_config) == {"a"}
    with pytest.raises(TypeError, match="UOE adapters"):
        add_regression_mean(build("qwen2_moe").requires_grad_(False), ["a"], {"a": own}, "mean")  # type: ignore[arg-type]
