import pytest
import torch
from torch.autograd import gradcheck

from uoe_peft.losses import anchor_loss, mask_to_top_k

SCORES = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0], [0.3, 0.4, 0.3]], dtype=torch.float64)
FIRST_TWO = torch.tensor([True, True, False, False])


def test_by_hand():
    # Target expert 1: (.5, -.8, .3) and (.1, -.2, .1).
    assert anchor_loss(SCORES, [1], FIRST_TWO).item() == pytest.approx((0.98 + 0.06) / 2)


def test_tokens_that_do_not_count_do_not_count():
    changed = SCORES.clone()
    changed[2] = torch.tensor([0.0, 0.0, 1.0])
    assert anchor_loss(changed, [1], FIRST_TWO) == anchor_loss(SCORES, [1], FIRST_TWO)


def test_is_zero_when_all_go_to_the_target_and_two_when_all_go_to_another():
    certain = torch.eye(3)[[1, 1]]
    mask = torch.ones(2, dtype=torch.bool)
    assert anchor_loss(certain, [1], mask) == 0
    assert anchor_loss(certain, [0], mask) == 2


def test_several_targets_share_one_vector():
    # Targets 0 and 2: (-.5, .2, -.7) and (-.9, .8, -.9).
    assert anchor_loss(SCORES, [0, 2], FIRST_TWO).item() == pytest.approx((0.78 + 2.26) / 2)


def test_mean_gate_by_hand():
    # Mean score (.3, .5, .2), target expert 1.
    assert anchor_loss(SCORES, [1], FIRST_TWO, reduction="mean_gate").item() == pytest.approx(0.09 + 0.25 + 0.04)


def test_mean_gate_of_one_token_is_its_distance():
    only = torch.tensor([True, False, False, False])
    assert anchor_loss(SCORES, [1], only, reduction="mean_gate").item() == pytest.approx(0.98)


def test_a_whole_batch_s_number_of_tokens_divides():
    assert anchor_loss(SCORES, [1], FIRST_TWO, denominator=8).item() == pytest.approx((0.98 + 0.06) / 8)


def test_mask_to_top_k_keeps_the_selected_scores():
    masked = mask_to_top_k(SCORES, torch.tensor([[0, 2], [1, 0], [0, 1], [2, 1]]))
    assert masked.tolist() == [[0.5, 0.0, 0.3], [0.1, 0.8, 0.0], [1.0, 0.0, 0.0], [0.0, 0.4, 0.3]]


def test_gradients():
    scores = SCORES.clone().requires_grad_()
    assert gradcheck(lambda s: anchor_loss(s, [1], FIRST_TWO), (scores,))
    assert gradcheck(lambda s: anchor_loss(s, [1], FIRST_TWO, reduction="mean_gate"), (scores,))


@pytest.mark.parametrize(
    ("targets", "mask", "reduction", "message"),
    [
        ([3], FIRST_TWO, "token", r"experts 0 to 2, got \[3\]"),
        ([4], FIRST_TWO, "token", "experts 0 to 2"),
        ([1, 3], FIRST_TWO, "token", "experts 0 to 2"),
        ([-1], FIRST_TWO, "token", "experts 0 to 2"),
        ([], FIRST_TWO, "token", "experts 0 to 2"),
        ([1], FIRST_TWO[:2], "token", r"mask has shape \(2,\), expected \(4,\)"),
        ([1], FIRST_TWO.repeat(2), "token", r"mask has shape \(8,\), expected \(4,\)"),
        ([1], FIRST_TWO, "max", "'token' or 'mean_gate'"),
        ([1], ~torch.ones(4, dtype=torch.bool), "mean_gate", "no token"),
    ],
)
def test_bad_arguments_are_refused(targets, mask, reduction, message):
    with pytest.raises(ValueError, match=message):
        anchor_loss(SCORES, targets, mask, reduction=reduction)


def test_the_range_of_experts_is_that_of_an_even_number_too():
    with pytest.raises(ValueError, match=r"experts 0 to 3, got \[4\]"):
        anchor_loss(torch.eye(4), [4], torch.ones(4, dtype=torch.bool))
