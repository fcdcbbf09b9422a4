"""The ridge solution against least squares on all tokens, stacked one under the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from uoe_peft.moments import SliceMoments, ridge_delta, steering_change

INPUTS, OUTPUTS = 5, 7


def moments_of(rows: Tensor) -> SliceMoments:
    return SliceMoments(rows.mean(dim=0), rows.T @ rows / len(rows), len(rows))


@pytest.mark.parametrize("coefficient", [0.0, 3.0])
@pytest.mark.parametrize("retain_weight", [0.0, 1.0, 10.0])
def test_it_is_least_squares(coefficient: float, retain_weight: float) -> None:
    forget, retain = torch.randn(30, INPUTS).double(), torch.randn(50, INPUTS).double() * 2
    weight, ridge = torch.randn(OUTPUTS, INPUTS).double(), 0.01
    direction = torch.nn.functional.normalize(torch.randn(OUTPUTS).double(), dim=0)
    outputs = forget @ weight.T
    target = coefficient * outputs.square().sum(dim=1).mean().sqrt() * direction
    # Each set counts with its mean over tokens, the ridge with the mean eigenvalue of both.
    mean_eigenvalue = (forget.square().mean(dim=0) + retain_weight * retain.square().mean(dim=0)).mean()
    left = np.concatenate(
        [
            forget / len(forget) ** 0.5,
            (retain_weight / len(retain)) ** 0.5 * retain,
            (ridge * mean_eigenvalue) ** 0.5 * torch.eye(INPUTS),
        ]
    )
    right = np.zeros((len(left), OUTPUTS))
    right[: len(forget)] = (target - outputs) / len(forget) ** 0.5
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    change = steering_change(
        weight, moments_of(forget), direction=direction if coefficient else None, coefficient=coefficient
    )
    found = ridge_delta(change, moments_of(forget), moments_of(retain), retain_weight=retain_weight, ridge=ridge)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_bad_numbers_are_named() -> None:
    some, other = moments_of(torch.randn(9, INPUTS)), moments_of(torch.randn(9, 4))
    change = torch.zeros(OUTPUTS, INPUTS)
    with pytest.raises(ValueError, match="retain_weight must be >= 0"):
        ridge_delta(change, some, some, retain_weight=-1, ridge=0.1)
    with pytest.raises(ValueError, match="ridge must be > 0"):
        ridge_delta(change, some, some, retain_weight=1, ridge=0)
    with pytest.raises(ValueError, match="5 and 4 dimensions"):
        ridge_delta(change, some, other, retain_weight=1, ridge=0.1)
    with pytest.raises(ValueError, match="the slice has 5 inputs, the moments are of 4"):
        steering_change(change, other)
    with pytest.raises(ValueError, match="coefficient must be >= 0"):
        steering_change(change, some, coefficient=-1)
    with pytest.raises(ValueError, match=r"direction has shape \(5,\), the slice has 7 outputs"):
        steering_change(change, some, direction=torch.ones(5), coefficient=1)
    nothing = moments_of(torch.zeros(9, INPUTS))
    with pytest.raises(ValueError, match="NaN, infinite or zero"):
        ridge_delta(change, nothing, nothing, retain_weight=1, ridge=0.1)
