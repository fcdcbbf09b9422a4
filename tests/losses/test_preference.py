import math

import pytest
import torch
from torch.autograd import gradcheck

from uoe_peft.losses import dpo_loss, npo_loss, simnpo_loss


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


NLL, REF = double(3.0, 5.0), double(1.0, 6.0)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_npo_by_hand():
    expected = -(2 / 0.3) * (log_sigmoid(0.3 * 2.0) + log_sigmoid(0.3 * -1.0)) / 2
    assert npo_loss(NLL, REF, beta=0.3).item() == pytest.approx(expected)


def test_npo_at_the_base_model_is_two_log_two_over_beta():
    assert npo_loss(REF, REF, beta=0.1).item() == pytest.approx(2 * math.log(2) / 0.1)


def test_npo_tends_to_gradient_ascent_as_beta_tends_to_zero():
    nll = NLL.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(npo_loss(nll, REF, beta=1e-6), nll)
    torch.testing.assert_close(gradient, double(-0.5, -0.5), atol=1e-5, rtol=0)  # of -mean(nll)


def test_npo_leaves_forgotten_answers_alone():
    nll = double(1.0, 500.0).requires_grad_()
    (gradient,) = torch.autograd.grad(npo_loss(nll, double(1.0, 1.0), beta=0.1), nll)
    assert gradient[0] == pytest.approx(-0.5)
    assert abs(gradient[1]) < 1e-20


def test_simnpo_by_hand():
    expected = -(2 / 1.3) * (log_sigmoid(1.3 * (3 / 2 - 0.25)) + log_sigmoid(1.3 * (5 / 4 - 0.25))) / 2
    assert simnpo_loss(NLL, double(2, 4), beta=1.3, delta=0.25).item() == pytest.approx(expected)


def test_simnpo_of_answers_of_one_token_and_of_none():
    expected = -(2 / 1.3) * (log_sigmoid(1.3 * (3 / 1 - 0.25)) + log_sigmoid(1.3 * (0 - 0.25))) / 2
    assert simnpo_loss(double(3, 0), double(1, 0), beta=1.3, delta=0.25).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda **options: npo_loss(NLL, REF, **options),
        lambda **options: simnpo_loss(NLL, REF, **options),
        lambda **options: dpo_loss(NLL, REF, 2 * NLL, REF, **options),
    ],
)
def test_a_whole_batch_s_number_of_examples_divides(loss):
    assert loss(denominator=5).item() == pytest.approx(loss().item() * 2 / 5)


def test_simnpo_without_margin_is_npo_against_a_certain_reference():
    torch.testing.assert_close(
        simnpo_loss(NLL, double(2, 4), beta=2.0, delta=0), npo_loss(NLL / double(2, 4), double(0, 0), beta=2.0)
    )


def test_dpo_by_hand():
    alternative, ref_alternative = double(2.0, 2.0), double(4.0, 1.0)
    expected = -(2 / 0.3) * (log_sigmoid(0.3 * (2.0 + 2.0)) + log_sigmoid(0.3 * (-1.0 - 1.0))) / 2
    assert dpo_loss(NLL, REF, alternative, ref_alternative, beta=0.3).item() == pytest.approx(expected)
    assert dpo_loss(REF, REF, REF, REF, beta=0.5).item() == pytest.approx(4 * math.log(2))


def test_dpo_with_an_unchanged_alternative_is_npo():
    torch.testing.assert_close(dpo_loss(NLL, REF, REF, REF, beta=0.5), npo_loss(NLL, REF, beta=0.5))


def test_gradients():
    nll, alternative = NLL.clone().requires_grad_(), (2 * REF).requires_grad_()
    assert gradcheck(lambda x: npo_loss(x, REF, beta=0.3), (nll,))
    assert gradcheck(lambda x: simnpo_loss(x, double(2, 3), beta=0.3, delta=0.1), (nll,))
    assert gradcheck(lambda x, y: dpo_loss(x, REF, y, NLL, beta=0.3), (nll, alternative))


def test_the_reference_gets_no_gradient():
    ref = REF.clone().requires_grad_()
    assert not npo_loss(NLL, ref).requires_grad
    assert not dpo_loss(NLL, ref, NLL, ref).requires_grad


def test_bad_arguments_are_refused():
    for beta in (0, -1, math.nan):
        with pytest.raises(ValueError, match="beta must be > 0"):
            npo_loss(NLL, REF, beta=beta)
    with pytest.raises(ValueError, match=r"'ref_nll': \(1,\)"):
        npo_loss(NLL, REF[:1])
    with pytest.raises(ValueError, match="one value for each example"):
        simnpo_loss(NLL, torch.tensor([1]))
