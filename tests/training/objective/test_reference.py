import pytest
import torch

from uoe_peft.data import collate_groups
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.objective.reference import Reference

ROWS = [
    {"forget": {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "index": 3}},
    {"forget": {"input_ids": [9, 10, 11], "labels": [-100, -100, 11], "index": 1}},
]
BATCH = collate_groups(ROWS, pad_token_id=0)["forget"]


@torch.no_grad()
def edit(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))


def test_the_reference_is_the_model_without_its_adapter(build):
    expected = forward_answers(build.model(), BATCH)
    model = build.uoe(build.model())
    edit(model)
    reference = Reference(model, hidden_layer=2)
    assert not torch.allclose(forward_answers(model, BATCH).logits, expected.logits)
    torch.testing.assert_close(reference.answers(model, BATCH).logits, expected.logits)
    torch.testing.assert_close(reference.nll(model, "forget", BATCH), expected.nll())
    assert not reference.nll(model, "forget", BATCH).requires_grad
    assert not torch.allclose(forward_answers(model, BATCH).logits, expected.logits)  # the adapter is back
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_what_is_frozen_stays_frozen(build):
    model = build.uoe(build.model())
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    frozen.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values())
    Reference(model).answers(model, BATCH)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_no_dropout_and_the_mode_comes_back(build):
    model = build.uoe(build.model())
    model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.9
    model.train()
    reference = Reference(model)
    first, second = (reference.answers(model, BATCH).logits for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_precomputed_values_survive_full_training(build):
    model = build.model()
    reference = Reference(model, hidden_layer=1)
    with pytest.raises(RuntimeError, match="no base model any more"):
        reference.nll(model, "forget", BATCH)
    expected = forward_answers(model, BATCH, hidden_layer=1)
    for need in ("nll", "hidden"):
        reference.precompute("forget", [BATCH], need=need)
    edit(model)
    torch.testing.assert_close(reference.nll(model, "forget", BATCH), expected.nll())
    torch.testing.assert_close(reference.hidden(model, "forget", BATCH), expected.hidden)
    with pytest.raises(RuntimeError, match="no base model any more"):
        reference.nll(model, "alternative", BATCH)


def test_precomputed_values_belong_to_an_example_not_to_a_place(build):
    model = build.uoe(build.model())
    reference = Reference(model, hidden_layer=1)
    for need in ("nll", "hidden"):
        reference.precompute("forget", [BATCH], need=need)
    swapped = collate_groups(ROWS[::-1], pad_token_id=0)["forget"]
    expected = forward_answers(model, swapped, hidden_layer=1)
    torch.testing.assert_close(reference.nll(model, "forget", swapped), expected.nll())
    torch.testing.assert_close(reference.hidden(model, "forget", swapped), expected.hidden)
