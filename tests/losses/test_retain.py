import math

import pytest
import torch
from torch.autograd import gradcheck

from uoe_peft.losses import kl_loss, nll_loss, trace_weights

LOG_PROBS = torch.tensor([1 / 4, 1 / 2], dtype=torch.float64).log()


def test_nll_by_hand():
    assert nll_loss(LOG_PROBS).item() == pytest.approx(1.5 * math.log(2))
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    assert nll_loss(LOG_PROBS, weights=weights).item() == pytest.approx((0.5 * 2 + 1.5) / 2 * math.log(2))


def test_kl_by_hand():
    logits = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    ref_logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    expected = 1 / 4 * math.log(2 / 4) + 3 / 4 * math.log(3 / 2)
    assert kl_loss(logits, ref_logits).item() == pytest.approx(expected)


def test_kl_of_equal_distributions_is_zero():
    logits = torch.randn(3, 7, dtype=torch.float64)
    assert kl_loss(logits, logits + 5).item() == pytest.approx(0, abs=1e-12)


def test_kl_agrees_with_torch():
    logits, ref_logits = torch.randn(5, 11), torch.randn(5, 11)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=ref_logits), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(kl_loss(logits, ref_logits), expected.mean())


def test_gradients_reach_the_model_only():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ref_logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda z: kl_loss(z, ref_logits.detach()), (logits,))
    assert gradcheck(nll_loss, (logits,))
    kl_loss(logits, ref_logits).backward()
    assert ref_logits.grad is None


def test_trace_weights_by_hand():
    # Ratios 3 and, capped, 4: tokens that reach no, the first, both target experts get 1, 3, 6, normalised.
    routed = torch.tensor([[0, 0], [1, 0], [1, 1]])
    weights = trace_weights(routed, torch.tensor([0.6, 0.5]), torch.tensor([0.2, 0.0]), cap=4)
    torch.testing.assert_close(weights, torch.tensor([1.0, 3.0, 6.0]) * 3 / 10)


def test_a_cap_of_one_lets_no_token_count_more():
    routed = torch.tensor([[1], [0], [1]])
    torch.testing.assert_close(trace_weights(routed, torch.tensor([0.9]), torch.tensor([0.3]), cap=1), torch.ones(3))
    # Forget tokens reach it half as often: 0.5 against 1.
    fewer = trace_weights(routed, torch.tensor([0.2]), torch.tensor([0.4]), cap=1)
    torch.testing.assert_close(fewer, torch.tensor([0.5, 1.0, 0.5]) * 3 / 2)


def test_no_weight_is_negative():
    # Ratios 0.2 and 0.1: 1 - 0.8 - 0.9 for a token that reaches both.
    routed = torch.tensor([[1, 1], [0, 0]])
    weights = trace_weights(routed, torch.tensor([0.1, 0.05]), torch.tensor([0.5, 0.5]), cap=3)
    torch.testing.assert_close(weights, torch.tensor([0.0, 2.0]))


def test_tokens_that_all_reach_what_is_never_forgotten_get_no_weight():
    assert trace_weights(torch.ones(2, 1), torch.zeros(1), torch.ones(1)).tolist() == [0, 0]


def test_equal_rates_weigh_all_tokens_alike():
    routed, rate = torch.tensor([[1], [0], [1]]), torch.tensor([0.3])
    torch.testing.assert_close(trace_weights(routed, rate, rate), torch.ones(3))


def test_bad_arguments_are_refused():
    for columns, ref_columns in ((3, 4), (4, 3)):
        with pytest.raises(ValueError, match=rf"\(2, {columns}\), ref_logits \(2, {ref_columns}\); .* same tokens"):
            kl_loss(torch.zeros(2, columns), torch.zeros(2, ref_columns))
    with pytest.raises(ValueError, match="cap must be >= 1"):
        trace_weights(torch.ones(1, 1), torch.ones(1), torch.ones(1), cap=0.5)
