"""Chunks of logits give what all logits give."""

import pytest
import torch
import torch.nn.functional as F

from uoe_peft.training.objective.logits import AnswerLogits

N, H, V = 11, 5, 13


@pytest.fixture
def states():
    return torch.randn(N, H, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def weight():
    return torch.randn(V, H, dtype=torch.float64)


def log_probs(targets):
    return lambda logits, tokens: -F.cross_entropy(logits, targets[tokens], reduction="none")


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 50])
def test_values_and_gradients_are_those_of_all_logits(states, weight, chunk_size):
    targets = torch.randint(V, (N,))
    upstream = torch.randn(N, dtype=torch.float64)
    whole = AnswerLogits(states @ weight.T).per_token(log_probs(targets))
    chunked = AnswerLogits(states, lambda hidden: hidden @ weight.T, chunk_size).per_token(log_probs(targets))
    torch.testing.assert_close(chunked, whole)
    # A loss that is not linear in the numbers: their slopes are scaled afterwards.
    expected, found = (torch.autograd.grad((x.exp() * upstream).sum(), states)[0] for x in (whole, chunked))
    torch.testing.assert_close(found, expected)
    assert found.any()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_each_token_goes_through_the_head_once_and_few_at_a_time(states, weight, with_gradient):
    sizes = []

    def head(hidden):
        sizes.append(len(hidden))
        return hidden @ weight.T

    with torch.set_grad_enabled(with_gradient):
        values = AnswerLogits(states, head, 4).per_token(log_probs(torch.zeros(N, dtype=torch.long)))
    if with_gradient:
        values.sum().backward()
    assert sizes == [4, 4, 3]
    assert values.requires_grad == with_gradient


def test_without_gradient_it_may_be_any_function(states, weight):
    logits = AnswerLogits(states, lambda hidden: hidden @ weight.T, 4)
    with torch.no_grad():
        found = logits.per_token(lambda logits, tokens: logits.argmax(dim=-1))
    assert torch.equal(found, (states @ weight.T).argmax(dim=-1))
    frozen = AnswerLogits(states.detach(), lambda hidden: hidden @ weight.T, 4)
    assert torch.equal(frozen.per_token(lambda logits, tokens: logits.argmax(dim=-1)), found)


def test_logits_that_are_there_or_are_few_are_handed_over_at_once(states, weight):
    head, parts = (lambda hidden: hidden @ weight.T), []

    def squares(logits, tokens):
        parts.append(tokens)
        return logits.square().sum(dim=-1)

    found = [logits.per_token(squares) for logits in (AnswerLogits(states, head), AnswerLogits(head(states), None, 4))]
    assert parts == [slice(None)] * 2
    (slope,) = torch.autograd.grad(found[0].sum(), states, create_graph=True)
    assert torch.autograd.grad(slope.sum(), states)[0].any()
    assert AnswerLogits(states) != AnswerLogits(states)  # each is its own: values are not compared


def test_differentiating_twice_is_refused_rather_than_wrong(states, weight):
    logits = AnswerLogits(states, lambda hidden: hidden @ weight.T, 4)
    values = logits.per_token(log_probs(torch.zeros(N, dtype=torch.long)))
    (gradient,) = torch.autograd.grad(values.square().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
