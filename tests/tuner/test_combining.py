"""A weighted sum of adapters is exact, in float32, and there or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.tuner.conftest import hand_edited, make_config, randomise, stored_deltas
from uoe_peft.tuner import UOEConfig, UOELayer
from uoe_peft.tuner.combining import combined_config

Logits = Callable[..., Tensor]
LOW_RANK = {"delta_type": "low_rank", "router_delta_type": "low_rank"}


def two_adapters(base: PreTrainedModel, *, autocast_adapter_dtype: bool = True, **kwargs: Any) -> PeftModel:
    """Adapters of one expert and its neighbour, whose low-rank scales differ."""
    model = get_peft_model(
        base, make_config(base, **kwargs, r=2, uoe_alpha=2), autocast_adapter_dtype=autocast_adapter_dtype
    )
    layer_idx = model.peft_config["default"].target_experts[0][0]
    config = make_config(base, target_experts=[(layer_idx, 1), (layer_idx, 4)], **kwargs, r=3, uoe_alpha=6)
    model.add_adapter("second", config, autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(model)
    randomise(model, adapter_name="second", seed=1)
    return model.eval()


def uoe_layers(model: PeftModel) -> list[UOELayer]:
    return [module for module in model.modules() if isinstance(module, UOELayer)]


def sums_of(model: PeftModel, factors: dict[str, float]) -> dict[tuple[Any, ...], Tensor]:
    """Weighted sums of stored deltas in float64, by layer, projection and expert."""
    sums: dict[tuple[Any, ...], Tensor] = {}
    for place, layer in enumerate(uoe_layers(model)):
        for name, factor in factors.items():
            for projection, index, delta in stored_deltas(layer, name):
                key = (place, projection, index)
                sums[key] = sums.get(key, 0) + factor * delta.double()
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kwargs", "scales"), [({}, (1, 1)), (LOW_RANK, (1, 2))])
def test_linear_sums_are_exact_whatever_the_base_is_stored_in(
    qwen: PreTrainedModel,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
    scales: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = two_adapters(qwen.to(dtype), **kwargs)

    def no_decomposition(*_: object, **__: object) -> None:
        raise AssertionError("an exact sum needs no decomposition")

    monkeypatch.setattr(torch.linalg, "svd", no_decomposition)
    model.base_model.add_weighted_adapter(["default", "second"], [0.7, np.float32(-1.3)], "mixed")
    expected = sums_of(model, {"default": 0.7 * scales[0], "second": -1.3 * scales[1]})
    assert {key[2] for key in expected} == {0, 1, 4}  # experts, and 0 of the router
    for place, layer in enumerate(uoe_layers(model)):
        for projection, index in layer.edited_keys(["mixed"]):
            found = layer.get_delta_weight("mixed", projection, index)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), expected[place, projection, index], rtol=1e-5, atol=1e-6)
    config = model.peft_config["mixed"]
    assert config.delta_type == config.router_delta_type == ("low_rank" if kwargs else "full")
    if kwargs:
        assert config.r == 5
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".mixed." in name)


def test_sums_of_transposed_low_rank_deltas(models: dict[str, PreTrainedModel], logits: Logits) -> None:
    base = models["gpt_oss"]
    model = two_adapters(copy.deepcopy(base), **LOW_RANK)
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.25], "mixed")
    model.set_adapter("mixed")
    expected = logits(hand_edited(base, model, {"default": 0.5, "second": 0.5}))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def test_decompositions_of_bfloat16_deltas(qwen: PreTrainedModel) -> None:
    model = two_adapters(qwen.to(torch.bfloat16), autocast_adapter_dtype=False)
    options = {"combination_type": "".join("svd"), "svd_rank": np.int64(2)}
    model.base_model.add_weighted_adapter(["default"], [2.0], "small", **options)
    for layer in uoe_layers(model)[1:]:  # experts; "svd" leaves the full delta of a router full
        for projection, index, delta in stored_deltas(layer, "default"):
            left, singular, right = np.linalg.svd(2 * delta.detach().double().numpy(), full_matrices=False)
            found = layer.get_delta_weight("small", projection, index)
            assert found.dtype == torch.float32
            best = torch.from_numpy(left[:, :2] * singular[:2] @ right[:2])
            torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)


def kept(delta: Tensor, density: float) -> Tensor:
    """The entries of greatest magnitude, others 0; a random delta has no two of one magnitude."""
    flat = sorted(delta.abs().flatten().tolist(), reverse=True)
    return torch.where(delta.abs() >= flat[int(density * len(flat)) - 1], delta, 0)


def ties_by_hand(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """Entry by entry: the sign of the greater mass, and the mean of the weighted deltas of that sign."""
    mixed = torch.zeros_like(deltas[0])
    for place in torch.cartesian_prod(*map(torch.arange, mixed.shape)):
        row, column = place.tolist()
        values = [float(delta[row, column]) for delta in deltas]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agreeing = [weight * value for value, weight in zip(values, weights, strict=True) if value * sign > 0]
        mixed[row, column] = sum(agreeing) / max(len(agreeing), 1)
    return mixed


@pytest.mark.parametrize(("kwargs", "scales"), [({}, (1, 1)), (LOW_RANK, (1, 2))])
@pytest.mark.parametrize("combination_type", ["magnitude_prune", "ties"])
def test_deltas_are_pruned_and_not_their_factors(
    qwen: PreTrainedModel, combination_type: str, kwargs: dict[str, Any], scales: tuple[float, float]
) -> None:
    model = two_adapters(qwen, **kwargs)
    weights = [0.7, 1.5]
    model.base_model.add_weighted_adapter(
        ["default", "second"], weights, "mixed", combination_type=combination_type, density=0.25
    )
    assert model.peft_config["mixed"].delta_type == "full"
    for layer in uoe_layers(model):
        deltas: dict[tuple[str, int], list[tuple[Tensor, float]]] = {}
        for name, scale, weight in zip(["default", "second"], scales, weights, strict=True):
            for projection, index, delta in stored_deltas(layer, name):
                deltas.setdefault((projection, index), []).append((kept(scale * delta.detach().float(), 0.25), weight))
        for (projection, index), own in deltas.items():
            pruned, factors = [delta for delta, _ in own], [weight for _, weight in own]
            expected = sum(weight * delta for delta, weight in own)
            if combination_type == "ties":
                expected = ties_by_hand(pruned, factors)
            torch.testing.assert_close(layer.get_delta_weight("mixed", projection, index), expected)


def test_dare_drops_at_random_and_keeps_the_mean(qwen: PreTrainedModel) -> None:
    model = two_adapters(qwen)
    torch.manual_seed(0)
    model.base_model.add_weighted_adapter(["default"], [2.0], "few", combination_type="dare_linear", density=0.5)
    dropped = total = 0
    for layer in uoe_layers(model):
        for projection, index, delta in stored_deltas(layer, "default"):
            found = layer.get_delta_weight("few", projection, index)
            left = found != 0
            torch.testing.assert_close(found[left], 4 * delta.detach()[left])  # weight 2, over the density
            dropped, total = dropped + int((~left).sum()), total + left.numel()
    assert abs(dropped / total - 0.5) < 5 * (0.25 / total) ** 0.5


def test_what_is_pruned_may_be_truncated(qwen: PreTrainedModel) -> None:
    model = two_adapters(qwen, **LOW_RANK)
    model.base_model.add_weighted_adapter(
        ["default"], [1.0], "small", combination_type="magnitude_prune_svd", density=0.5, svd_rank=1
    )
    assert (model.peft_config["small"].delta_type, model.peft_config["small"].r) == ("low_rank", 1)
    for layer in uoe_layers(model):
        for projection, index, delta in stored_deltas(layer, "default"):
            left, singular, right = np.linalg.svd(kept(delta.detach(), 0.5).double().numpy(), full_matrices=False)
            best = torch.from_numpy(left[:, :1] * singular[:1] @ right[:1])
            found = layer.get_delta_weight("small", projection, index)
            torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["default"], [float("nan")]), {}, "weights must be finite"),
        ((["default"], [float("inf")]), {}, "weights must be finite"),
        ((["default"], [1.0]), {"combination_type": "svd", "svd_rank": 0}, "svd_rank must be an integer >= 1"),
        ((["default"], [1.0]), {"combination_type": "svd", "svd_rank": True}, "svd_rank must be an integer >= 1"),
        ((["default"], [1.0]), {"combination_type": "mean"}, "combination_type must be"),
        ((["default"], [1.0]), {"combination_type": "ties"}, "needs density"),
        ((["default"], [1.0]), {"combination_type": "linear", "density": 0.5}, "takes no density"),
        ((["default"], [1.0]), {"combination_type": "linear", "svd_rank": 2}, "takes no svd_rank"),
        (
            (["default"], [1.0]),
            {"combination_type": "dare_ties", "density": 0.0},
            "must be a finite number > 0",
        ),
        ((["default"], [1.0]), {"combination_type": "dare_linear", "density": 1.5}, "at most 1"),
        ((["default"], [1.0]), {"combination_type": "magnitude_prune", "density": float("nan")}, "density must be"),
        (
            (["default"], [1.0]),
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "mean"},
            "majority_sign_method must be",
        ),
        ((["default", "second"], [1.0, 1.0]), {"combination_type": "".join("cat")}, "different experts"),
    ],
)
def test_bad_combinations_change_nothing(
    qwen: PreTrainedModel, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    model = two_adapters(qwen)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(*arguments, "new", **options)
    assert set(model.state_dict()) == names and set(model.peft_config) == {"default", "second"}


def test_a_message_names_what_is_unknown(qwen: PreTrainedModel) -> None:
    tuner = two_adapters(qwen).base_model
    for adapters, named in ((["default", "absent"], r"\['absent'\]"), ([], r"\[\]")):
        with pytest.raises(ValueError, match=f"adapters {named} not found"):
            tuner.add_weighted_adapter(adapters, [1.0, 1.0], "new")
    with pytest.raises(ValueError, match="must name each adapter once"):
        tuner.add_weighted_adapter(["default", "default"], [1.0, 1.0], "new")
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=f"got 2 adapters and {len(weights)} weights"):
            tuner.add_weighted_adapter(["default", "second"], weights, "new")


# Two adapters' choices, and that of a sum that can hold both.
SUMS = [
    ("delta_type", "full", "full", "full"),
    ("delta_type", "low_rank", "full", "full"),
    ("delta_type", "low_rank", "low_rank", "low_rank"),
    ("router_delta_type", "low_rank", "low_rank", "low_rank"),
    ("router_delta_type", "full", "low_rank", "full"),
    ("router_delta_type", "full", "full", "full"),
    ("train_router", False, False, False),
    ("train_router", False, True, True),
    ("use_rslora", True, True, False),
    ("strength", 0.5, 0.25, 1.0),
    ("r", 3, 4, 7),
    ("target_projections", None, ["down_proj"], None),
    ("target_projections", ["up_proj"], ["down_proj", "up_proj"], ["down_proj", "up_proj"]),
    ("modules_to_save", ["lm_head"], ["lm_head"], None),
    ("base_model_name_or_path", "org/base", "org/other", "org/base"),
    ("attribution", {"score": "gate"}, {"score": "gate"}, None),
]


@pytest.mark.parametrize(("name", "first", "second", "expected"), SUMS)
def test_the_config_of_a_sum(name: str, first: Any, second: Any, expected: Any) -> None:
    # Strings as a parser makes them: equal to the code's own, but not the same objects.
    values = ["".join(value) if isinstance(value, str) else value for value in (first, second)]
    configs = [UOEConfig(target_experts=[(2, place)], **{name: value}) for place, value in enumerate(values)]
    found = combined_config(configs, "linear", None)
    assert getattr(found, name) == expected
    assert found.target_experts == [(2, 0), (2, 1)]
    assert found.uoe_alpha == found.r and not found.use_rslora  # scale 1
    assert combined_config(configs, "svd", None).r == max(config.r for config in configs)
    assert combined_config(configs, "svd", 2).r == 2


def test_a_sum_that_no_router_is_part_of_has_the_default_kind_of_router() -> None:
    config = UOEConfig(target_experts=[(2, 1)], train_router=False, router_delta_type="low_rank")
    assert combined_config([config], "linear", None).router_delta_type == "full"


def test_an_exact_sum_takes_the_scale_of_what_holds_it_into_account(qwen: PreTrainedModel) -> None:
    model = two_adapters(qwen, **LOW_RANK)  # scales 1 and 2
    for layer in uoe_layers(model):
        layer.set_combination("second", {"default": -0.5}, combine=None)
        for projection, index, delta in stored_deltas(layer, "default"):
            if index in layer.target_indices["second"]:
                torch.testing.assert_close(layer.get_delta_weight("second", projection, index), -0.5 * delta)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_combination_that_fails_half_way_leaves_no_adapter(
    qwen: PreTrainedModel, logits: Logits, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = two_adapters(qwen)
    said, names = logits(model), set(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    calls: list[object] = []

    def fail(*args: object, **_: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(UOELayer, "set_combination", fail)
    with pytest.raises(error):
        model.base_model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "new")
    assert set(model.state_dict()) == names and set(model.peft_config) == {"default", "second"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits(model), said)


def test_modules_saved_in_full_cannot_be_added(qwen: PreTrainedModel) -> None:
    model = get_peft_model(qwen, make_config(qwen, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head is saved in full by one of \['default'\]"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "new")


@pytest.mark.parametrize("combination_type", ["linear", "ties"])
def test_slices_that_no_adapter_edits_stay_as_they_are(qwen: PreTrainedModel, combination_type: str) -> None:
    layer_idx = get_peft_model(copy.deepcopy(qwen), make_config(qwen)).peft_config["default"].target_experts[0][0]
    model = get_peft_model(qwen, make_config(qwen, target_experts=[(layer_idx, 1)], target_projections=["down_proj"]))
    other = make_config(qwen, target_experts=[(layer_idx, 4)], target_projections=["gate_up_proj"], train_router=False)
    model.add_adapter("second", other)
    randomise(model)
    randomise(model, adapter_name="second", seed=1)
    options = {} if combination_type == "linear" else {"density": 1.0}
    with pytest.warns(UserWarning, match="no pruning") if options else nullcontext():
        model.base_model.add_weighted_adapter(
            ["default", "second"], [1.0, 1.0], "mixed", combination_type=combination_type, **options
        )
    for layer in uoe_layers(model)[1:]:
        for projection, index in layer.edited_keys(["mixed"]):
            stored = [key for name in ("default", "second") for key in stored_deltas(layer, name)]
            expected = {key[:2]: key[2] for key in stored}
            delta = layer.get_delta_weight("mixed", projection, index)
            torch.testing.assert_close(delta, expected.get((projection, index), torch.zeros_like(delta)))
