import pytest
import torch
from peft import LoraConfig, get_peft_model

from uoe_peft.data import collate
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.training.objective.forward import decoder_layer, forward_answers, head_is_exact

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
    monkeypatch.setattr("uoe_peft.training.objective.forward._accepts_logits_to_keep", lambda _: False)
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


@pytest.mark.parametrize("logits_at_once", [1, 97 * 2, 97 * 3])
def test_logits_in_chunks_say_the_same(build, logits_at_once):
    model = build.uoe(build.model())
    whole, chunked = (forward_answers(model, BATCH, logits_at_once=n, hidden_layer=1) for n in (None, logits_at_once))
    assert (chunked.predictions.head is None) == (logits_at_once == 97 * 3)  # as many as there are: nothing to split
    for read in ("logits", "log_probs", "accuracy", "hidden"):
        torch.testing.assert_close(getattr(chunked, read), getattr(whole, read))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected, found = (torch.autograd.grad(o.nll().square().sum(), trained) for o in (whole, chunked))
    torch.testing.assert_close(found, expected)
    assert any(gradient.any() for gradient in found)


def test_accuracy_and_likelihood_take_one_pass_of_the_head(build):
    model = build.uoe(build.model())
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, output: sizes.append(output[0].shape[-2]))
    outputs = forward_answers(model, BATCH, logits_at_once=97 * 2)
    assert sizes == [0]
    assert [outputs.accuracy.ndim, outputs.nll().ndim, outputs.log_probs.ndim] == [0, 1, 1]
    assert sizes == [0, 2, 1]


@pytest.mark.parametrize("kind", ["trained", "adapted", "copied"])
def test_a_head_that_is_trained_or_adapted_is_applied_at_once(build, kind):
    """Else its logits, made later, would not be those of the adapter that was on or off then."""
    model = build.model()
    if kind == "adapted":
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["lm_head"]))
    if kind == "copied":
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert forward_answers(model, BATCH, logits_at_once=1).predictions.head is None
    if kind != "trained":
        with model.disable_adapter():
            assert forward_answers(model, BATCH, logits_at_once=1).predictions.head is None


def test_a_pass_that_ends_below_the_head_has_no_logits(model):
    whole = forward_answers(model, BATCH, hidden_layer=1)
    part = forward_answers(model, BATCH, hidden_layer=1, last_layer=1)
    assert torch.equal(part.hidden, whole.hidden)
    assert part.lengths.tolist() == [2, 1]
    with pytest.raises(RuntimeError, match="ended below the LM head"):
        part.nll()


def test_a_head_is_tried_before_it_is_trusted(model):
    model.train()
    assert head_is_exact(model, BATCH)
    assert model.training
    # Something between decoder and logits that is not in the model's own forward pass.
    model.register_forward_hook(lambda model, args, output: setattr(output, "logits", output.logits * len(calls)))
    calls = [1]
    model.model.register_forward_hook(lambda decoder, args, output: calls.append(1))
    assert not head_is_exact(model, BATCH)
