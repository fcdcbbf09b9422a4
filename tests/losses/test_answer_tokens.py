import math

import pytest
import torch

from uoe_peft.losses import answer_lengths, answer_positions, answer_targets, mean, sequence_nll, token_log_probs

LABELS = torch.tensor([[-100, 5, 6, -100], [7, -100, 8, 9]])


def test_an_answer_token_is_predicted_from_the_position_before_it():
    assert answer_positions(LABELS).tolist() == [[True, True, False, False], [False, True, True, False]]
    targets, rows = answer_targets(LABELS)
    assert targets.tolist() == [5, 6, 8, 9]  # 7 is a first token: nothing predicts it
    assert rows.tolist() == [0, 0, 1, 1]


def test_targets_are_in_the_order_of_the_selected_positions():
    ids = torch.arange(8).reshape(2, 4)
    targets, _ = answer_targets(torch.where(LABELS == -100, LABELS, ids))
    assert targets.tolist() == (ids[answer_positions(LABELS)] + 1).tolist()


def test_log_probs_of_two_tokens():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    expected = torch.tensor([3 / 4, 4 / 5]).log()
    torch.testing.assert_close(token_log_probs(logits, torch.tensor([1, 0])), expected)


def test_log_probs_are_computed_in_float32():
    assert token_log_probs(torch.zeros(3, 7, dtype=torch.bfloat16), torch.tensor([0, 1, 2])).dtype == torch.float32
    assert token_log_probs(torch.zeros(3, 7, dtype=torch.float64), torch.tensor([0, 1, 2])).dtype == torch.float64


def test_sequence_nll_sums_or_averages_each_answer():
    log_probs, rows = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 2])
    assert sequence_nll(log_probs, rows, num_examples=3).tolist() == [3.0, 0.0, 4.0]
    assert sequence_nll(log_probs, rows, num_examples=3, reduction="mean").tolist() == [1.5, 0.0, 4.0]
    assert answer_lengths(rows, num_examples=3).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="'sum' or 'mean', got 'max'"):
        sequence_nll(log_probs, rows, num_examples=3, reduction="max")


def test_parts_of_a_batch_add_up_to_the_whole():
    values = torch.tensor([1.0, 2.0, 9.0])
    assert mean(values) == 4
    assert mean(values[:1], 3) + mean(values[1:], 3) == 4
    with pytest.raises(ValueError, match="no answer tokens"):
        mean(values[:0])
