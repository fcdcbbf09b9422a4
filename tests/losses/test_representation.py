import pytest
import torch
from torch.autograd import gradcheck

from uoe_peft.losses import (
    adaptive_coefficient,
    control_direction,
    embed_diff_loss,
    relative_embed_diff_loss,
    rmu_loss,
)

HIDDEN = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]], dtype=torch.float64)
DIRECTION = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)


def test_rmu_by_hand():
    # 5 u = (3, 0, 4): distances (-2, 2, -4) and (-3, -1, -1).
    assert rmu_loss(HIDDEN, DIRECTION, coefficient=5).item() == pytest.approx((24 / 3 + 11 / 3) / 2)


def test_the_coefficient_may_be_a_tensor_without_dimensions():
    expected = rmu_loss(HIDDEN, DIRECTION, coefficient=5)
    torch.testing.assert_close(rmu_loss(HIDDEN, DIRECTION, coefficient=torch.tensor(5.0)), expected)


def test_rmu_is_zero_at_its_target():
    assert rmu_loss(7 * DIRECTION.expand(2, 3), DIRECTION, coefficient=7) == 0


def test_adaptive_coefficient_is_a_multiple_of_each_tokens_norm():
    coefficient = adaptive_coefficient(HIDDEN, beta=0.6)
    torch.testing.assert_close(coefficient, 0.6 * torch.tensor([5.0, 10.0], dtype=torch.float64).sqrt())
    expected = sum(rmu_loss(h[None], DIRECTION, coefficient=c.item()) for h, c in zip(HIDDEN, coefficient, strict=True))
    torch.testing.assert_close(rmu_loss(HIDDEN, DIRECTION, coefficient=coefficient), expected / 2)


def test_rmu_agrees_with_a_plain_implementation():
    hidden, direction = torch.randn(5, 7), control_direction(7, seed=3)
    total = sum((hidden[t, j].item() - 20 * direction[j].item()) ** 2 for t in range(5) for j in range(7))
    assert rmu_loss(hidden, direction, coefficient=20).item() == pytest.approx(total / 35, rel=1e-5)


def test_rmu_does_not_overflow_half_precision():
    assert rmu_loss(HIDDEN.half(), DIRECTION, coefficient=8000).isfinite()


def test_control_direction_has_length_one_and_depends_on_the_seed_only():
    direction = control_direction(33, seed=5)
    assert direction.norm().item() == pytest.approx(1)
    assert torch.equal(direction, control_direction(33, seed=5))
    assert not torch.equal(direction, control_direction(33, seed=6))


def test_embed_diff_by_hand():
    assert embed_diff_loss(HIDDEN, HIDDEN) == 0
    assert embed_diff_loss(HIDDEN, HIDDEN.flip(0)).item() == pytest.approx((1 + 9 + 9) / 3)


def test_relative_embed_diff_by_hand():
    # Squared distances 1 + 9 + 9 of both tokens, squared norms 1 + 9 and 1 + 4.
    assert relative_embed_diff_loss(HIDDEN, HIDDEN) == 0
    assert relative_embed_diff_loss(HIDDEN, HIDDEN.flip(0)).item() == pytest.approx((19 / 10 + 19 / 5) / 2)
    assert relative_embed_diff_loss(HIDDEN, HIDDEN.flip(0), denominator=7.0).item() == pytest.approx(5.7 / 7)
    assert relative_embed_diff_loss(torch.zeros_like(HIDDEN), HIDDEN).item() == pytest.approx(1)


def test_relative_embed_diff_does_not_depend_on_the_scale_of_hidden_states():
    moved = HIDDEN + torch.tensor([[0.3, 0.0, -0.1], [0.2, 0.5, 0.0]])
    expected = relative_embed_diff_loss(moved, HIDDEN)
    torch.testing.assert_close(relative_embed_diff_loss(1000 * moved, 1000 * HIDDEN), expected)
    assert relative_embed_diff_loss((300 * moved).half(), (300 * HIDDEN).half()).item() == pytest.approx(
        expected.item(), rel=1e-2
    )


def test_relative_embed_diff_of_a_token_without_a_norm_is_finite_where_it_stays():
    ref_hidden = HIDDEN * torch.tensor([[1.0], [0.0]])
    assert relative_embed_diff_loss(ref_hidden.clone(), ref_hidden) == 0


def test_gradients():
    hidden = HIDDEN.clone().requires_grad_()
    assert gradcheck(lambda h: rmu_loss(h, DIRECTION, coefficient=3.0), (hidden,))
    assert gradcheck(lambda h: embed_diff_loss(h, HIDDEN.flip(0)), (hidden,))
    assert gradcheck(lambda h: relative_embed_diff_loss(h, HIDDEN.flip(0)), (hidden,))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected \(3,\), the hidden size"):
        rmu_loss(HIDDEN, DIRECTION[:2], coefficient=1)
    with pytest.raises(ValueError, match=r"direction has shape \(4,\), expected \(3,\)"):
        rmu_loss(HIDDEN, torch.ones(4), coefficient=1)
    for beta in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"beta must be > 0, got {beta}"):
            adaptive_coefficient(HIDDEN, beta=beta)
    for hidden, ref_hidden in ((HIDDEN, HIDDEN[:1]), (HIDDEN[:1], HIDDEN)):
        with pytest.raises(ValueError, match="same tokens"):
            embed_diff_loss(hidden, ref_hidden)
        with pytest.raises(ValueError, match="same tokens"):
            relative_embed_diff_loss(hidden, ref_hidden)


def test_a_denominator_divides_the_sum_over_tokens() -> None:
    """Of another number of tokens than hidden sizes: a mean over the wrong dimension would count those."""
    generator = torch.Generator().manual_seed(0)
    hidden, reference = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    direction = control_direction(5, seed=1).double()
    squares = [
        float(sum((a - b) ** 2 for a, b in zip(h, r, strict=True)) / 5) for h, r in zip(hidden, reference, strict=True)
    ]
    assert float(embed_diff_loss(hidden, reference, denominator=7.0)) == pytest.approx(sum(squares) / 7)
    assert float(embed_diff_loss(hidden, reference)) == pytest.approx(sum(squares) / 3)
    away = [float(sum((a - 2 * u) ** 2 for a, u in zip(h, direction, strict=True)) / 5) for h in hidden]
    assert float(rmu_loss(hidden, direction, coefficient=2.0, denominator=7.0)) == pytest.approx(sum(away) / 7)
