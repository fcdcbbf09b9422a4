"""What says how something is done is passed by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from uoe_peft.tuner import UOELinearLayer, UOERouterLayer, arguments, card, loading, mixed_batches
from uoe_peft.tuner.delta import DeltaLayer

NAMES = [
    (arguments.as_int, ["minimum"]),
    (arguments.as_number, ["zero"]),
    (card.card, ["pictures"]),
    (loading.check_state_dict, ["prefix"]),
    (mixed_batches.handed_out, ["num_copies"]),
    (DeltaLayer.update_layer, ["projections", "indices", "delta_type"]),
    (DeltaLayer.set_combination, ["combine"]),
    (DeltaLayer.get_delta_weight, ["rows"]),
    (DeltaLayer.edited_slice, ["rows"]),
    (UOELinearLayer.__init__, ["writes_output"]),
    (UOERouterLayer.__init__, ["gate_name"]),
]


@pytest.mark.parametrize(("function", "names"), NAMES)
def test_options_are_passed_by_name(function: Callable[..., Any], names: list[str]) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == names
