"""The projection against its definition by eigenvectors, and against its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uoe_peft.moments import SliceMoments, retain_projection, surviving_share


def moments_of(rows: Tensor) -> SliceMoments:
    return SliceMoments(rows.mean(dim=0), rows.T @ rows / len(rows), len(rows))


@pytest.fixture
def retain() -> SliceMoments:
    scales = torch.tensor([5.0, 2.0, 1.0, 0.1, 0.0])  # the last direction is never taken
    return moments_of(torch.randn(40, 5) * scales)


@pytest.mark.parametrize("rho", [0.1, 1.0, 3.0])
def test_every_eigenvector_is_damped_by_its_eigenvalue(retain: SliceMoments, rho: float) -> None:
    values, vectors = torch.linalg.eigh(retain.second.double())
    mean = values.mean()
    expected = sum(
        torch.outer(vectors[:, i], vectors[:, i]) / (1 + values[i] / (rho * mean)) for i in range(len(values))
    )
    found = retain_projection(retain, rho)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found, found.T)


def test_the_limits_are_nothing_and_the_null_space(retain: SliceMoments) -> None:
    torch.testing.assert_close(retain_projection(retain, 1e12), torch.eye(5, dtype=torch.float64))
    null_space = torch.zeros(5, 5, dtype=torch.float64)
    null_space[4, 4] = 1
    torch.testing.assert_close(retain_projection(retain, 1e-12), null_space, atol=1e-6, rtol=0)


def test_what_survives_is_the_energy_of_projected_tokens(retain: SliceMoments) -> None:
    rows = torch.randn(30, 5)
    projection = retain_projection(retain, 0.5)
    expected = (rows.double() @ projection).square().sum() / rows.double().square().sum()
    assert surviving_share(moments_of(rows), projection) == pytest.approx(float(expected), rel=1e-5)
    unseen = torch.zeros(3, 5)
    unseen[:, 4] = 1
    assert surviving_share(moments_of(unseen), projection) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), float("inf")])
def test_rho_must_be_positive(retain: SliceMoments, rho: float) -> None:
    with pytest.raises(ValueError, match="rho must be > 0 and finite, got"):
        retain_projection(retain, rho)


def test_moments_that_say_nothing_are_refused(retain: SliceMoments) -> None:
    with pytest.raises(ValueError, match="the 7 retain tokens put nothing into the slice"):
        retain_projection(moments_of(torch.zeros(7, 5)), 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        retain_projection(moments_of(torch.full((7, 5), torch.nan)), 1)
    with pytest.raises(ValueError, match=r"shapes \(4, 4\) and \(5, 5\)"):
        surviving_share(retain, torch.eye(4))
