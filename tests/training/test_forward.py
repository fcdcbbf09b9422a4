import pytest
import torch

from uoe_peft.data import collate
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.training.forward import decoder_layer, forward_answers

BATCH = collate(
    [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100]},
        {"input_ids": [10, 11, 12], "labels": [-100, -100, 12]},
    ],
    pad_token_id=0,
)


@pytest.fixture
def logits(model):
    return model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


def test_answers_are_read_where_they_are_predicted(model, logits):
    outputs = forward_answers(model, BATCH)
    torch.testing.assert_close(outputs.logits, torch.stack([logits[0, 1], logits[0, 2], logits[1, 1]]))
    assert outputs.targets.tolist() == [7, 8, 12]
    assert outputs.rows.tolist() == [0, 0, 1]
    assert outputs.lengths.tolist() == [2, 1]


def test_a_model_that_computes_all_logits_gives_the_same(model, monkeypatch):
    expected = forward_answers(model, BATCH)
    monkeypatch.setattr("uoe_peft.training.forward._accepts_logits_to_keep", lambda _: False)
    torch.testing.assert_close(forward_answers(model, BATCH).logits, expected.logits)


def test_nll_and_accuracy(model, logits):
    outputs = forward_answers(model, BATCH)
    log_probs = logits.log_softmax(-1)
    first, second = -(log_probs[0, 1, 7] + log_probs[0, 2, 8]), -log_probs[1, 1, 12]
    torch.testing.assert_close(outputs.nll(), torch.stack([first, second]))
    torch.testing.assert_close(outputs.nll("mean"), torch.stack([first / 2, second]))
    right = [logits[0, 1].argmax() == 7, logits[0, 2].argmax() == 8, logits[1, 1].argmax() == 12]
    assert outputs.accuracy.item() == pytest.approx(sum(map(int, right)) / 3)


def test_hidden_states_are_the_chosen_layers(model):
    hidden = forward_answers(model, BATCH, hidden_layer=1).hidden
    all_hidden = model(
        input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"], output_hidden_states=True
    ).hidden_states
    after_layer_1 = all_hidden[2]
    torch.testing.assert_close(hidden, torch.stack([after_layer_1[0, 1], after_layer_1[0, 2], after_layer_1[1, 1]]))


def test_layers_out_of_range_are_refused(model):
    for layer_idx in (3, -1):
        with pytest.raises(ValueError, match=r"has 3 decoder layers, got layer .*; use 0 to 2"):
            decoder_layer(model, layer_idx)
    with pytest.raises(UnsupportedModelError):
        decoder_layer(torch.nn.Linear(2, 3), 0)
