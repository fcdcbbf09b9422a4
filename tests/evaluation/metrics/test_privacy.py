"""Membership scores by hand."""

from __future__ import annotations

import zlib

import pytest
import torch

from uoe_peft.evaluation.metrics import (
    membership_auc,
    mia_loss,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_zlib,
    privleak,
)

LOG_PROBS = torch.tensor([-1.0, -8.0, -2.0, -3.0, -4.0])


def test_scores_by_hand() -> None:
    assert mia_loss(LOG_PROBS) == pytest.approx(-18 / 5)
    assert mia_zlib(LOG_PROBS, "aaaa") == pytest.approx(-18 / len(zlib.compress(b"aaaa")))
    assert mia_min_k(LOG_PROBS, k=0.4) == pytest.approx((-8 - 4) / 2)
    assert mia_min_k(LOG_PROBS) == -8.0
    assert mia_min_k_plus_plus(torch.tensor([0.5, -2.0, -1.0, 3.0]), k=0.5) == pytest.approx(-1.5)


def test_of_one_token_that_one_is_taken() -> None:
    assert mia_min_k(torch.tensor([-3.0]), k=0.01) == -3.0


@pytest.mark.parametrize("k", [0.0, -0.1, 1.1])
def test_a_share_out_of_range_is_refused(k: float) -> None:
    with pytest.raises(ValueError, match=r"k must be in \(0, 1\]"):
        mia_min_k(LOG_PROBS, k=k)


def test_auc_counts_pairs() -> None:
    members, others = [3.0, 1.0, 2.0], [0.0, 2.0]
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert membership_auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    with pytest.raises(ValueError, match="got 0 and 2"):
        membership_auc([], others)


def test_leak_is_negative_for_what_is_still_known() -> None:
    assert privleak(1.0) == -100.0
    assert privleak(0.5) == 0.0
    assert privleak(0.0) == 100.0
    assert privleak(0.7, 0.6) == pytest.approx(100 * (0.3 - 0.4) / 0.4)
    with pytest.raises(ValueError, match="reference_auc"):
        privleak(0.5, 1.0)
