"""What a forward pass is asked for, what is counted, and when the LM head is trusted by itself."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from uoe_peft.data import collate
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.training.objective import forward
from uoe_peft.training.objective.forward import decoder_layer, forward_answers, head_is_exact, layer_output
from uoe_peft.training.objective.reference import Reference

V = 97
EPS = torch.finfo(torch.float32).eps
BATCH = collate(
    [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100]},
        {"input_ids": [10, 11, 12], "labels": [-100, -100, 12]},
    ],
    pad_token_id=0,
)


@pytest.fixture
def frozen(model):
    """A model whose head is not trained, and so may be applied by itself."""
    return model.requires_grad_(False)


@pytest.fixture
def asked(model):
    """Keyword arguments of every call of the model."""
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def test_no_pass_fills_a_key_value_cache(frozen, asked):
    forward_answers(frozen, BATCH)
    assert forward_answers(frozen, BATCH, logits_at_once=V).predictions.head is not None
    forward_answers(frozen, BATCH, hidden_layer=1, last_layer=1)
    assert [call["use_cache"] for call in asked] == [False] * 3


def test_logits_are_made_only_where_answers_are_predicted(model, asked, monkeypatch):
    whole = model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    expected = torch.stack([whole[0, 1], whole[0, 2], whole[1, 1]])
    asked.clear()
    torch.testing.assert_close(forward_answers(model, BATCH).logits, expected)
    assert asked[0]["logits_to_keep"].tolist() == [1, 2]  # columns: 7, 8 and 12 are predicted there
    monkeypatch.setattr(forward, "_accepts_logits_to_keep", lambda _: False)
    torch.testing.assert_close(forward_answers(model, BATCH).logits, expected)
    assert "logits_to_keep" not in asked[1]
    assert asked[1]["use_cache"] is False


@pytest.mark.parametrize(
    ("placed", "keep"),
    [({"model": "cpu", "lm_head": "cpu"}, [1, 2]), ({"model": "cpu", "lm_head": "cuda:0"}, 4)],
)
def test_a_model_on_several_devices_is_asked_for_a_number_of_columns(model, asked, placed, keep):
    """The last layer's device has no list of columns; on one device all entries name it."""
    expected = forward_answers(model, BATCH).logits
    asked.clear()
    model.hf_device_map = placed
    torch.testing.assert_close(forward_answers(model, BATCH).logits, expected)
    found = asked[0]["logits_to_keep"]
    assert (found if isinstance(found, int) else found.tolist()) == keep


def test_a_batch_without_answers_has_no_logits_on_any_number_of_devices(model):
    batch = BATCH | {"labels": torch.full_like(BATCH["labels"], -100)}
    for placed in ({"": "cpu"}, {"model": "cpu", "lm_head": "cuda:0"}):
        model.hf_device_map = placed
        assert forward_answers(model, batch).logits.shape == (0, V)


def test_accuracy_is_the_share_of_most_likely_tokens(model):
    likeliest = forward_answers(model, BATCH).logits.argmax(dim=-1)
    for shift, expected in ((0, 1.0), (1, 0.0), (-1, 0.0)):
        labels = BATCH["labels"].clone()
        labels[0, 2], labels[0, 3], labels[1, 2] = (likeliest + shift) % V
        assert forward_answers(model, BATCH | {"labels": labels}).accuracy == expected
    labels[0, 2] = likeliest[0]
    assert forward_answers(model, BATCH | {"labels": labels}).accuracy.item() == pytest.approx(1 / 3)


def test_chunks_hold_as_many_logits_as_allowed_and_one_token_at_least(frozen):
    sizes = [forward_answers(frozen, BATCH, logits_at_once=n).predictions.chunk_size for n in (1, V, 2 * V + 5)]
    assert sizes == [1, 1, 2]
    for more_than_there_are in (3 * V, 3 * V + 1, 4 * V):
        assert forward_answers(frozen, BATCH, logits_at_once=more_than_there_are).predictions.head is None


def test_a_model_whose_head_is_not_found_makes_its_logits_at_once(frozen, monkeypatch):
    def nowhere(model):
        raise UnsupportedModelError("no head")

    expected = forward_answers(frozen, BATCH).logits
    monkeypatch.setattr(forward, "find_lm_head", nowhere)
    found = forward_answers(frozen, BATCH, logits_at_once=1)
    assert found.predictions.head is None
    assert torch.equal(found.logits, expected)


def replace_layers(config, num_layers):
    return type(config).from_dict(config.to_dict() | {"num_hidden_layers": num_layers, "layer_types": None})


@pytest.mark.parametrize("num_layers", [2, 3])
def test_layers_are_counted_from_zero(model, num_layers):
    model = type(model)(replace_layers(model.config, num_layers))
    for layer_idx in range(num_layers):
        assert decoder_layer(model, layer_idx) is model.model.layers[layer_idx]
    for layer_idx in (-1, num_layers, num_layers + 1):
        with pytest.raises(ValueError, match=rf"got layer {layer_idx}; use 0 to {num_layers - 1}$"):
            decoder_layer(model, layer_idx)


def test_of_a_layer_that_returns_several_things_the_first_is_its_output(model, monkeypatch):
    layer, states = model.model.layers[1], torch.randn(2, 3, 32)
    monkeypatch.setattr(layer, "forward", lambda x: (x + 1, x + 2, x + 3))
    with layer_output(model, 1) as outputs:
        layer(states)
    assert len(outputs) == 1
    assert torch.equal(outputs[0], states + 1)


@pytest.mark.parametrize(("error_in_eps", "exact"), [(0, True), (3.6, True), (4.4, False), (-3.6, True), (-4.4, False)])
def test_a_head_is_exact_up_to_four_roundings(model, error_in_eps, exact):
    def scale(model, args, output):
        handle.remove()  # the model's own logits come first; the head by itself is run through the same module
        output.logits = (output.logits.double() * (1 + error_in_eps * EPS)).float()

    handle = model.register_forward_hook(scale)
    assert head_is_exact(model, BATCH) is exact


def test_a_head_that_says_nothing_says_it_exactly(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert head_is_exact(model, BATCH)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError])
def test_a_family_that_fails_without_its_own_logits_is_not_exact(model, monkeypatch, error):
    def fail(*args):
        raise error("it wants its logits")

    monkeypatch.setattr(forward, "apply_lm_head", fail)
    assert head_is_exact(model, BATCH) is False


def test_other_errors_of_the_trial_are_raised(model, monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(forward, "apply_lm_head", fail)
    with pytest.raises(ZeroDivisionError):
        head_is_exact(model, BATCH)


@pytest.mark.parametrize(("lengths", "tried"), [((5, 7), 8), ((9, 2), 8), ((2, 3), 5)])
def test_the_trial_takes_the_first_eight_answer_tokens(model, lengths, tried):
    rows = [{"input_ids": [5, *range(10, 10 + n)], "labels": [-100, *range(10, 10 + n)]} for n in lengths]
    heads = []
    model.lm_head.register_forward_hook(lambda head, args, output: heads.append(output.shape[:-1].numel()))
    assert head_is_exact(model, collate(rows, pad_token_id=0))
    assert heads[-1] == tried


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (forward_answers, ["hidden_layer", "last_layer", "logits_at_once"]),
        (Reference.precompute, ["need"]),
    ],
)
def test_what_says_how_is_passed_by_name(function, names):
    parameters = inspect.signature(function).parameters
    assert [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == names
    assert not any(p.kind is p.POSITIONAL_ONLY for p in parameters.values())


def test_logits_are_not_exchanged_for_others(model):
    outputs = forward_answers(model, BATCH)
    with pytest.raises(FrozenInstanceError):
        outputs.predictions.head = None
    with pytest.raises(FrozenInstanceError):
        outputs.rows = outputs.targets
    assert outputs != forward_answers(model, BATCH)  # each is its own: values are not compared
