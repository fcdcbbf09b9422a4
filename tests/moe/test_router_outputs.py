"""What is found among the tensors that routers return, each case by hand."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from uoe_peft.moe.gating import (
    RoutingSpy,
    are_marks,
    find_activation,
    find_logits,
    find_selection,
    from_marks,
    no_scores_error,
    normalised_scores,
    router_tensors,
    sum_to_one,
    watched_selection,
)

T, E, K = 5, 7, 3


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(T, E) * 2


def test_token_dimensions_are_flattened_and_what_is_no_tensor_is_left_out() -> None:
    whole, scalar, index = torch.randn(2, 3, E), torch.tensor(1.0), torch.zeros(6, K, dtype=torch.long)
    found = router_tensors((whole, None, scalar, index))
    assert [tuple(t.shape) for t in found] == [(6, E), (6, K)]
    assert torch.equal(found[0], whole.reshape(6, E))
    assert router_tensors([whole])[0].shape == (6, E)
    assert router_tensors(whole)[0].shape == (6, E)
    assert router_tensors(torch.arange(4.0))[0].shape == (1, 4)
    assert router_tensors("no tensor") == []


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (RoutingSpy, ["widths", "keep_tensors"]),
        (find_logits, ["widths", "num_tokens"]),
        (are_marks, ["num_experts"]),
    ],
)
def test_what_says_how_to_read_is_passed_by_name(function: Callable[..., object], names: list[str]) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == names


def test_logits_have_the_width_and_the_length_that_is_asked_for(logits: torch.Tensor) -> None:
    others = [torch.randn(T, E + 1), torch.zeros(T, E, dtype=torch.long), torch.randn(T + 1, E), logits]
    assert find_logits(others, widths=(E,), num_tokens=T) is logits
    assert find_logits(others, widths=(E,), num_tokens=None) is others[2]
    assert find_logits(others, widths=(E, E + 1), num_tokens=T) is others[0]
    assert find_logits(others, widths=(E - 1,), num_tokens=T) is None
    assert find_logits([], widths=(E,), num_tokens=None) is None


def test_of_two_that_fit_the_zero_filled_one_is_a_copy_unless_it_is_alone(logits: torch.Tensor) -> None:
    values, index = logits.topk(E - 1, dim=-1)  # some are negative
    table = torch.zeros(T, E).scatter(1, index, values)
    assert find_logits([table, logits], widths=(E,), num_tokens=T) is logits
    assert find_logits([table], widths=(E,), num_tokens=T) is table
    assert find_logits([table, table.clone()], widths=(E,), num_tokens=T) is table


def test_a_selection_is_a_pair_of_indices_and_weights_of_one_shape(logits: torch.Tensor) -> None:
    weights, index = logits.softmax(-1).topk(K, dim=-1)
    wide, narrow = torch.randn(T, K + 1), torch.randn(T, K - 1)
    for dtype in (torch.int64, torch.int32):
        found = find_selection([logits, wide, narrow, index.to(dtype), weights, 2 * weights], logits)
        assert found is not None
        assert found[0].dtype == torch.int64
        assert torch.equal(found[0], index)
        assert found[1] is weights
    assert find_selection([logits, wide, index], logits) is None
    # All experts selected: the logits have the shape of the indices, and are not their weights.
    every = torch.arange(E).expand(T, E)
    assert find_selection([logits, every], logits) is None


@pytest.mark.parametrize("num_selected", [1, K, E - 1])
def test_a_zero_filled_table_is_a_selection(logits: torch.Tensor, num_selected: int) -> None:
    values, index = (logits.abs() + 1).topk(num_selected, dim=-1)
    table = torch.zeros(T, E).scatter(1, index, values)
    found = find_selection([table], logits)
    assert found is not None
    assert torch.equal(found[0], index)
    assert torch.equal(found[1], values)
    assert find_selection([table], None) is None
    assert find_selection([table[:-1]], logits) is None
    assert find_selection([F.pad(table, (0, 1))], logits) is None
    one_token = find_selection([table[:1]], logits[:1])
    assert one_token is not None
    assert torch.equal(one_token[0], index[:1])


def test_tables_that_are_full_empty_uneven_or_of_integers_are_no_selection(logits: torch.Tensor) -> None:
    uneven = torch.zeros(T, E)
    uneven[0, 0], uneven[1:, :2] = 1, 1
    for table in (torch.ones(T, E), torch.zeros(T, E), uneven, uneven.flip(0), torch.eye(T, E).long()):
        assert find_selection([table], logits) is None
    assert find_selection([torch.ones(T, 300)], torch.randn(T, 300)) is None
    assert find_selection([logits[:0]], logits[:0]) is None


def test_marks_are_ones_among_more_than_two_experts() -> None:
    marks = torch.tensor([[0, 1, 0], [1, 0, 1]])
    assert are_marks(marks, num_experts=3)
    assert not are_marks(marks, num_experts=4)
    assert not are_marks(torch.tensor([[0, 1, 2]]), num_experts=3)
    assert not are_marks(torch.tensor([[0, 1]]), num_experts=2)
    assert not are_marks(torch.tensor([[0]]), num_experts=1)
    assert not are_marks(torch.tensor([[0, 1, 0, 1]]), num_experts=3)
    assert are_marks(torch.zeros(2, 300), num_experts=300)


def test_marks_give_as_many_experts_as_the_fullest_row() -> None:
    marks = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 1.1, 1.2]]).double()
    index, found = from_marks(marks, weights)
    assert index.shape == found.shape == (3, 2)
    assert found.dtype == torch.float64
    order = index[0].argsort()
    assert index[0][order].tolist() == [0, 2]
    torch.testing.assert_close(found[0][order], weights[0, [0, 2]])
    assert index[1, 0] == 3
    torch.testing.assert_close(found[1], torch.tensor([0.8, 0.0]).double())
    assert found[2].tolist() == [0, 0]
    none = from_marks(torch.zeros(2, 4), weights[:2])
    assert none[0].shape == (2, 1)
    assert none[1].tolist() == [[0], [0]]


def test_a_spy_sees_what_is_as_narrow_as_router_logits(logits: torch.Tensor) -> None:
    with RoutingSpy(widths=(E, E + 1), keep_tensors=True) as spy:
        torch.sigmoid(torch.randn(T, E + 2))
        torch.randn(T, E + 2).topk(K)
        assert (spy.seen, spy.values, watched_selection(spy)) == (set(), None, None)
        scores = F.softmax(torch.randn(2, 2 * E, E + 1), dim=-1)  # more tokens than any width
        weights, index = scores.topk(K, dim=-1)
        other = torch.randn(2, 2 * E, K) * 2
        scores.gather(-1, index.flip(-1)), index + 1, index * 2  # a selection of its own, and what weighs nothing
        weights.repeat(2, 1, 1), scores.transpose(0, 1)
        F.softplus(torch.randn(T, 0))
    assert spy.seen == {"softmax"}
    assert spy.values is scores
    found = watched_selection(spy)
    assert found is not None
    assert torch.equal(found[0], index.reshape(4 * E, K))
    assert torch.equal(found[1], weights.reshape(4 * E, K))
    assert other.shape == weights.shape  # of the weights' shape, but not made of them
    assert watched_selection(None) is None


@pytest.mark.parametrize("width", [1, E, E + 1])
def test_an_activation_of_fewer_columns_than_the_widest_logits_counts(width: int) -> None:
    with RoutingSpy(widths=(E, E + 1), keep_tensors=True) as spy:
        torch.sigmoid(torch.randn(T, width))
    assert spy.seen == {"sigmoid"}


def test_a_spy_that_keeps_nothing_sees_the_activation_alone(logits: torch.Tensor) -> None:
    with RoutingSpy(widths=(E,), keep_tensors=False) as spy:
        F.logsigmoid(logits).exp().topk(K)
        F.softplus(logits).sqrt()
    assert spy.seen == {"sigmoid", "sqrtsoftplus"}
    assert (spy.values, spy.top_k_index, spy.top_k_weights) == (None, None, None)


def test_scores_sum_to_one_in_float32(logits: torch.Tensor) -> None:
    for name, values in {
        "softmax": logits.exp(),
        "sigmoid": 1 / (1 + (-logits).exp()),
        "sqrtsoftplus": (1 + logits.exp()).log().sqrt(),
    }.items():
        expected = values / values.sum(dim=1, keepdim=True)
        torch.testing.assert_close(normalised_scores(logits, name), expected)
        assert normalised_scores(logits.bfloat16(), name).dtype == torch.float32
    assert sum_to_one(torch.tensor([[1, 3], [2, 2]])).tolist() == [[0.25, 0.75], [0.5, 0.5]]


def test_probabilities_are_known_by_their_sign_and_their_sum(logits: torch.Tensor) -> None:
    p = logits.softmax(-1)
    p[:, 0] += p[:, 1]
    p[:, 1] = 0  # as small as a probability can be
    weights, index = p.topk(K, dim=-1)
    assert find_activation([], p * 1.005, index, weights) == "identity"
    assert find_activation(["softmax"], p * 1.02, index, weights) == "softmax"
    assert find_activation(["softmax"], p * 0.98, index, weights) == "softmax"
    moved = p.clone()
    moved[0, 0] += 0.5
    moved[0, 1] -= 0.5
    assert find_activation(["softmax"], moved, index, weights) == "softmax"


def test_weights_must_be_proportional_within_their_rounding(logits: torch.Tensor) -> None:
    weights, index = logits.softmax(-1).topk(K, dim=-1)
    assert find_activation([], logits, index, weights * (1 + 5e-5 * torch.randn(T, K).sign())) == "softmax"
    assert find_activation([], logits, index, weights * (1 + 1e-3 * torch.randn(T, K).sign())) is None
    cancelled = weights.clone()
    cancelled[0, 0] = 0
    assert find_activation([], logits, index, cancelled) == "softmax"


def test_the_tolerance_is_eight_roundings_of_the_coarser_dtype(logits: torch.Tensor) -> None:
    half = logits.half()
    weights, index = half.float().softmax(-1).topk(2, dim=-1)
    for roundings, expected in ((7.5, "softmax"), (8.5, None)):
        deviation = torch.tensor([1.0, -1.0]) * roundings * 2**-10
        assert find_activation(["softmax", "sigmoid"], half, index, weights * deviation.exp()) == expected


def test_an_expert_whose_score_is_zero_says_nothing() -> None:
    logits = torch.tensor([[3.0, 1.0, -200.0], [0.5, -200.0, 2.0]])
    index = torch.arange(3).expand(2, 3)
    assert find_activation([], logits, index, logits.softmax(-1) + 1e-20) == "softmax"


def test_several_experts_per_token_are_judged_within_each_token() -> None:
    logits = torch.tensor([[-9.5, -11.0, -30.0], [-10.5, -9.0, -30.0], [-9.75, -9.25, -30.0]])
    index = torch.arange(2).expand(3, 2)
    # exp(x), which softmax divides by one number a token; sigmoid differs by 1 + exp(x), less, but within tokens.
    assert find_activation([], logits, index, logits[:, :2].exp()) == "softmax"
    # Two weights of 1 are the sigmoids of large logits, and say more than one of 1.
    large = torch.tensor([[12.0, 12.0001], [14.0, 14.0001]])
    assert find_activation([], large, index[:2], torch.ones(2, 2)) == "sigmoid"


def test_one_expert_per_token_needs_weights_that_follow_the_scores(logits: torch.Tensor) -> None:
    index = logits.argmax(-1, keepdim=True)
    weights = logits.sigmoid().gather(1, index) * 1.7
    assert find_activation([], logits, index, weights) == "sigmoid"
    assert find_activation(["sigmoid", "sqrtsoftplus"], logits, index, torch.full((T, 1), 0.3)) == "sigmoid"


def test_an_unreadable_router_is_named() -> None:
    message = str(no_scores_error("layer 3 of X", "nothing came"))
    assert message.startswith("cannot read the routing of layer 3 of X: nothing came; expected router logits")
