"""The activation of a router is inferred from its weights where it cannot be watched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_peft.moe.gating import (
    RoutingSpy,
    find_activation,
    find_logits,
    find_selection,
    from_marks,
    normalised_scores,
)

ACTIVATIONS = {
    "softmax": lambda x: x.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}
NUM_TOKENS, NUM_EXPERTS = 17, 7


@pytest.fixture
def router_logits() -> Tensor:
    return torch.randn(NUM_TOKENS, NUM_EXPERTS) * 2


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_that_explains_the_weights_is_taken(
    router_logits: Tensor, activation: str, scale: float, normalised: bool
) -> None:
    weights, index = ACTIVATIONS[activation](router_logits).topk(3, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True) if normalised else weights
    assert find_activation([], router_logits, index, weights * scale) == activation
    bfloat16 = (weights * scale).bfloat16()
    assert find_activation([], router_logits.bfloat16(), index, bfloat16) == activation


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_expert_per_token_is_judged_over_tokens(router_logits: Tensor, activation: str) -> None:
    weights, index = ACTIVATIONS[activation](router_logits).topk(1, dim=-1)
    assert find_activation([], router_logits, index, weights * 2.5) == activation


def test_weights_that_say_nothing_mean_softmax(router_logits: Tensor) -> None:
    index = router_logits.argmax(dim=-1, keepdim=True)
    assert find_activation([], router_logits, index, torch.ones(NUM_TOKENS, 1)) == "softmax"


def test_what_was_seen_goes_before_what_the_weights_say(router_logits: Tensor) -> None:
    weights, index = torch.sigmoid(router_logits).topk(3, dim=-1)
    assert find_activation(["softmax"], router_logits, index, weights) == "softmax"
    assert find_activation(["softmax", "sigmoid"], router_logits, index, weights) == "sigmoid"


def test_probabilities_are_not_activated_again(router_logits: Tensor) -> None:
    probabilities = router_logits.softmax(dim=-1)
    weights, index = probabilities.topk(3, dim=-1)
    assert find_activation(["softmax"], probabilities, index, weights) == "identity"
    assert torch.equal(normalised_scores(probabilities, "identity"), probabilities)


def test_nothing_is_taken_where_nothing_explains(router_logits: Tensor) -> None:
    weights, index = (router_logits.relu() ** 2 + 1).topk(3, dim=-1)
    assert find_activation([], router_logits, index, weights) is None


def test_logits_and_a_zero_filled_table_are_told_apart(router_logits: Tensor) -> None:
    values, index = router_logits.topk(2, dim=-1)
    table = torch.zeros_like(router_logits).scatter(1, index, values.sigmoid())
    for tensors in ([table, router_logits], [router_logits, table]):
        logits = find_logits(tensors, widths=(NUM_EXPERTS,), num_tokens=None)
        assert logits is router_logits
        selection = find_selection(tensors, router_logits)
        assert selection is not None
        assert torch.equal(selection[0], index)
        assert torch.equal(selection[1], values.sigmoid())


def test_marks_become_indices_and_a_full_expert_gets_no_weight() -> None:
    marks = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0]])
    index, weights = from_marks(marks, torch.tensor([[0.5], [0.6], [0.7]]))
    assert index[[0, 2]].tolist() == [[1], [0]]
    torch.testing.assert_close(weights, torch.tensor([[0.5], [0.0], [0.7]]))


@pytest.mark.parametrize("normalise", ["none", "in place", "new"])
def test_the_spy_follows_weights_from_the_selection_to_their_last_change(router_logits: Tensor, normalise: str) -> None:
    with RoutingSpy(widths=(NUM_EXPERTS,), keep_tensors=True) as spy:
        scores = router_logits.sigmoid()
        index = (scores + 0.1).topk(2, dim=-1)[1]
        weights = scores.gather(1, index)
        match normalise:
            case "in place":
                weights /= weights.sum(dim=-1, keepdim=True)
            case "new":
                weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.double()
    assert spy.seen == {"sigmoid"}
    assert spy.top_k_weights is weights
    assert spy.top_k_index is index
    assert spy.values is scores
