"""Intervals cover what they promise, margins tell chance from difference, and constant memory suffices."""

from __future__ import annotations

import pytest
import torch

from uoe_peft.attribution.confidence import assess, half_agreement, normalised_entropy, top_share
from uoe_peft.attribution.streaming import SequenceMean


def stream(values: torch.Tensor, *, num_resamples: int = 400, batch_size: int = 7, seed: int = 0) -> SequenceMean:
    mean = SequenceMean(values.shape[1:], num_resamples=num_resamples, seed=seed)
    for batch in values.split(batch_size):
        mean.add(batch)
    return mean


def test_the_mean_is_the_mean_whatever_the_batches() -> None:
    values = torch.randn(31, 2, 5)
    for batch_size in (1, 7, 31):
        mean = stream(values, batch_size=batch_size)
        torch.testing.assert_close(mean.mean(), values.mean(dim=0))
        assert mean.num_sequences == 31


def test_halves_are_disjoint_and_complete() -> None:
    # Sequence j alone contributes to place j: a half's mean is positive exactly where it holds the sequence.
    halves = stream(torch.eye(20)).half_means()
    assert halves is not None
    assert torch.equal((halves > 0).sum(dim=0), torch.ones(20, dtype=torch.int64))
    assert (halves > 0).any(dim=1).all()


def test_intervals_are_as_wide_as_the_standard_error() -> None:
    values = torch.randn(500, 6) * 2 + 1
    resampled = stream(values, num_resamples=2_000).resampled_means()
    assert resampled is not None
    torch.testing.assert_close(resampled.std(dim=0), values.std(dim=0) / 500**0.5, rtol=0.15, atol=0)
    torch.testing.assert_close(resampled.mean(dim=0), values.mean(dim=0), rtol=0, atol=0.02)


def test_the_state_does_not_grow_with_the_stream() -> None:
    def state_size(mean: SequenceMean) -> int:
        return sum(v.numel() for v in vars(mean).values() if isinstance(v, torch.Tensor))

    assert state_size(stream(torch.randn(5, 3))) == state_size(stream(torch.randn(500, 3)))


def test_one_sequence_gives_no_resamples() -> None:
    mean = stream(torch.randn(1, 4))
    assert mean.resampled_means() is None
    assert mean.half_means() is None


def test_a_clear_lead_is_identified_and_a_tie_is_not() -> None:
    noise = torch.randn(200, 1, 3) * 0.3
    for lead, identified in ((0.5, True), (0.0, False)):
        values = noise + torch.tensor([lead, 0.0, -1.0])
        mean = stream(values)
        bootstrap = mean.resampled_means()
        assert bootstrap is not None
        sure = assess(mean.mean(), bootstrap, mean.half_means(), top_k=1)
        assert sure.identified is identified
        assert sure.margin_low <= sure.margin <= sure.margin_high
        assert (sure.low <= mean.mean()).all()
        assert (mean.mean() <= sure.high).all()
        assert (sure.stability > 0.99) is identified


def test_the_margin_is_judged_in_the_same_resamples() -> None:
    # Both experts rise and fall together, far more than they differ: separate intervals overlap, the margin is sure.
    common = torch.randn(100, 1, 1) * 5
    mean = stream(common + torch.tensor([[1.0, 0.9]]))
    bootstrap = mean.resampled_means()
    assert bootstrap is not None
    sure = assess(mean.mean(), bootstrap, None, top_k=1)
    assert sure.low[0, 0] < sure.high[0, 1]
    assert sure.identified
    assert sure.half_agreement is None


def test_unmeasured_experts_stay_unmeasured() -> None:
    affinity = torch.tensor([[0.5, torch.nan, 0.2]])
    sure = assess(affinity, affinity.expand(10, 1, 3), None, top_k=1)
    assert sure.margin == pytest.approx(0.3)
    assert sure.stability == 1
    assert sure.low.isnan().tolist() == [[False, True, False]]


def test_agreement_of_halves_by_hand() -> None:
    first = torch.tensor([[0.9, 0.8, 0.0, 0.0], [0.9, 0.8, 0.0, 0.0]])
    second = torch.tensor([[0.8, 0.9, 0.0, 0.0], [0.9, 0.0, 0.8, 0.0]])
    assert half_agreement(torch.stack([first, second]), top_k=2) == pytest.approx((1 + 1 / 2) / 2)


def test_concentration_by_hand() -> None:
    ratio = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(normalised_entropy(ratio), torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(top_share(ratio, count=2), torch.tensor([0.5, 1.0, 1.0]))
