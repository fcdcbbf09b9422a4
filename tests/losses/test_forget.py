import math

import pytest
import torch
from torch.autograd import gradcheck

from uoe_peft.losses import (
    adversarial_labels,
    grad_ascent_loss,
    kl_loss,
    nll_loss,
    random_labels,
    satimp_loss,
    token_log_probs,
    undial_loss,
    wga_loss,
)

# Two answer tokens of probability 1/4 and 1/2.
LOG_PROBS = torch.tensor([1 / 4, 1 / 2], dtype=torch.float64).log()
LOG2 = math.log(2)


def test_gradient_ascent_by_hand():
    assert grad_ascent_loss(LOG_PROBS).item() == pytest.approx(-1.5 * LOG2)
    assert grad_ascent_loss(LOG_PROBS) == -nll_loss(LOG_PROBS)


def test_wga_by_hand():
    assert wga_loss(LOG_PROBS, beta=1).item() == pytest.approx(-(2 / 4 + 1 / 2) * LOG2 / 2)
    assert wga_loss(LOG_PROBS, beta=2).item() == pytest.approx(-(2 / 16 + 1 / 4) * LOG2 / 2)


def test_satimp_by_hand():
    expected = -((1 / 4) ** 2 * (3 / 4) * 2 + (1 / 2) ** 2 * (1 / 2)) * LOG2 / 2
    assert satimp_loss(LOG_PROBS, beta1=2, beta2=1).item() == pytest.approx(expected)


def test_weights_of_one_are_gradient_ascent():
    assert wga_loss(LOG_PROBS, beta=0) == grad_ascent_loss(LOG_PROBS)
    assert satimp_loss(LOG_PROBS, beta1=0, beta2=0) == grad_ascent_loss(LOG_PROBS)
    torch.testing.assert_close(satimp_loss(LOG_PROBS, beta1=3, beta2=0), wga_loss(LOG_PROBS, beta=3))


@pytest.mark.parametrize("loss", [lambda x: wga_loss(x, beta=2), lambda x: satimp_loss(x, beta1=2, beta2=0)])
def test_weights_carry_no_gradient(loss):
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss(log_probs).backward()
    torch.testing.assert_close(log_probs.grad, LOG_PROBS.exp() ** 2 / 2)


def test_undial_by_hand():
    # Teacher: logits (log 8, 0) with the first, the answer's, lowered by log 8: one half each.
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    ref_logits = torch.tensor([[math.log(8), 0.0]], dtype=torch.float64)
    expected = -(math.log(1 / 4) + math.log(3 / 4)) / 2
    assert undial_loss(logits, ref_logits, torch.tensor([0]), beta=math.log(8)).item() == pytest.approx(expected)


def test_undial_without_penalty_has_the_gradient_of_kl():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    ref_logits, targets = torch.randn(3, 7, dtype=torch.float64), torch.tensor([1, 6, 0])
    (undial,) = torch.autograd.grad(undial_loss(logits, ref_logits, targets, beta=0), logits)
    (kl,) = torch.autograd.grad(kl_loss(logits, ref_logits), logits)
    torch.testing.assert_close(undial, kl)


def test_undial_agrees_with_a_plain_implementation():
    logits, ref_logits = torch.randn(5, 11, dtype=torch.float64), torch.randn(5, 11, dtype=torch.float64)
    targets, total = torch.randint(11, (5,)), 0.0
    for z, z_ref, y in zip(logits, ref_logits, targets.tolist(), strict=True):
        lowered = [z_ref[v].item() - (3.0 if v == y else 0.0) for v in range(11)]
        teacher = [math.exp(v) / sum(map(math.exp, lowered)) for v in lowered]
        log_sum = math.log(sum(math.exp(v) for v in z.tolist()))
        total -= sum(p * (v - log_sum) for p, v in zip(teacher, z.tolist(), strict=True))
    assert undial_loss(logits, ref_logits, targets, beta=3.0).item() == pytest.approx(total / 5)


def test_random_labels_are_uniform():
    for labels in (
        random_labels([7000], vocab_size=7, seeds=[1]),
        random_labels([1] * 7000, vocab_size=7, seeds=range(7000)),
    ):
        counts = labels.bincount()
        assert len(counts) == 7
        assert counts.min() > 800


def test_random_labels_of_an_answer_do_not_depend_on_the_others():
    together = random_labels([4, 3, 5], vocab_size=97, seeds=[8, 2, 2])
    assert torch.equal(together[4:7], random_labels([3], vocab_size=97, seeds=[2]))
    assert torch.equal(together[7:10], together[4:7])
    assert not torch.equal(together[:3], together[4:7])
    with pytest.raises(ValueError, match="shorter"):
        random_labels([4, 3], vocab_size=97, seeds=[8])


def test_adversarial_labels_are_the_best_wrong_token():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert adversarial_labels(logits, torch.tensor([0, 2])).tolist() == [2, 1]


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, targets: grad_ascent_loss(token_log_probs(logits, targets)),
        lambda logits, targets: nll_loss(token_log_probs(logits, adversarial_labels(logits, targets))),
        lambda logits, targets: undial_loss(logits, torch.ones_like(logits), targets, beta=2),
    ],
)
def test_gradients(loss):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(loss, (logits, torch.tensor([4, 0, 2])))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda: wga_loss(LOG_PROBS, beta=-1), "beta must be >= 0, got -1"),
        (lambda: wga_loss(LOG_PROBS, beta=-0.5), "beta must be >= 0, got -0.5"),
        (lambda: satimp_loss(LOG_PROBS, beta2=-0.5), "beta1 and beta2 must be >= 0, got 5.0 and -0.5"),
        (lambda: satimp_loss(LOG_PROBS, beta1=-0.5), "beta1 and beta2 must be >= 0, got -0.5 and 1.0"),
        (lambda: undial_loss(torch.zeros(2, 4), torch.zeros(2, 3), torch.tensor([0, 1])), r"\(2, 3\)"),
        (lambda: undial_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), beta=-0.5), "got -0.5"),
        (lambda: undial_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1])), r"\(2, 4\)"),
        (lambda: undial_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), beta=-1), "beta must"),
    ],
)
def test_bad_arguments_are_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        loss()
