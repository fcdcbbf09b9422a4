"""What says how something is done is passed by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from uoe_peft.tuner import (
    UOEExpertsLayer,
    UOELayer,
    UOELinearLayer,
    UOEModel,
    UOERouterLayer,
    arguments,
    card,
    loading,
    mixed_batches,
    targets,
)
from uoe_peft.tuner.delta import DeltaLayer

NAMES = [
    (arguments.as_int, ["minimum"]),
    (arguments.as_number, ["zero"]),
    (card.card, ["pictures", "moments_size"]),
    (loading.check_state_dict, ["prefix"]),
    (mixed_batches.handed_out, ["num_copies"]),
    (DeltaLayer.update_layer, ["projections", "indices", "delta_type"]),
    (DeltaLayer.set_combination, ["combine"]),
    (DeltaLayer.get_delta_weight, ["rows"]),
    (DeltaLayer.edited_slice, ["rows"]),
    (UOEExpertsLayer.update_layer, ["indices"]),
    (UOELinearLayer.__init__, ["writes_output"]),
    (UOERouterLayer.__init__, ["gate_name"]),
]


@pytest.mark.parametrize(("function", "names"), NAMES)
def test_options_are_passed_by_name(function: Callable[..., Any], names: list[str]) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == names


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (UOEModel.merge_adapter, {"adapter_names": None, "safe_merge": False}),
        (UOEModel.merge_and_unload, {"progressbar": False, "safe_merge": False, "adapter_names": None}),
        (
            UOEModel._unload_and_optionally_merge,
            {"merge": True, "progressbar": False, "safe_merge": False, "adapter_names": None},
        ),
        (UOELayer.merge, {"safe_merge": False, "adapter_names": None}),
    ],
)
def test_defaults_are_those_of_pefts_other_methods(function: Callable[..., Any], defaults: dict[str, object]) -> None:
    parameters = inspect.signature(function).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == defaults


def test_what_a_delta_sits_on_is_its_layers_to_say() -> None:
    assert inspect.isabstract(DeltaLayer)
    assert {"base_parameter", "base_slice"} <= DeltaLayer.__abstractmethods__


def test_targets_and_groups_are_not_changed_afterwards() -> None:
    for result in (targets.Target, mixed_batches.AppliedGroup):
        assert result.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert not targets.Target.writes_output
