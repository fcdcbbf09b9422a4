from copy import deepcopy

import pytest
import torch

from uoe_peft.data import collate_groups
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.objective.reference import Reference
from uoe_peft.tuner import UOEConfig

ROWS = [
    {"forget": {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "id": 33}},
    {"forget": {"input_ids": [9, 10, 11], "labels": [-100, -100, 11], "id": 11}},
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
    torch.testing.assert_close(reference.nll(model, BATCH), expected.nll())
    assert not reference.nll(model, BATCH).requires_grad
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
        reference.nll(model, BATCH)
    expected = forward_answers(model, BATCH, hidden_layer=1)
    for need in ("nll", "hidden"):
        reference.precompute([BATCH], need=need)
    edit(model)
    torch.testing.assert_close(reference.nll(model, BATCH), expected.nll())
    torch.testing.assert_close(reference.hidden(model, BATCH), expected.hidden)
    with pytest.raises(RuntimeError, match="no base model any more"):
        reference.nll(model, BATCH | {"id": torch.tensor([33, 12])})


def test_precomputed_values_belong_to_an_example_not_to_a_place(build):
    model = build.uoe(build.model())
    reference = Reference(model, hidden_layer=1)
    for need in ("nll", "hidden"):
        reference.precompute([BATCH], need=need)
    swapped = collate_groups(ROWS[::-1], pad_token_id=0)["forget"]
    expected = forward_answers(model, swapped, hidden_layer=1)
    torch.testing.assert_close(reference.nll(model, swapped), expected.nll())
    torch.testing.assert_close(reference.hidden(model, swapped), expected.hidden)


@pytest.fixture
def two_requests(build):
    """An earlier adapter, active and frozen, and one that is trained; and what the first alone makes of the base."""
    model = build.uoe(build.model())
    edit(model)
    first_alone = deepcopy(model).merge_and_unload()
    model.add_adapter("second", UOEConfig(target_experts=[(1, 2), (2, 4)]))
    model.base_model.set_adapter(["default", "second"])
    model.set_requires_grad("default", False)
    edit(model)
    return model, first_alone.eval()


def test_earlier_adapters_stay_on_in_the_current_reference(two_requests, build):
    model, first_alone = two_requests
    now = forward_answers(model, BATCH).logits
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for kind, expected in (("current", first_alone), ("base", build.model().eval())):
        found = Reference(model, kind=kind).answers(model, BATCH).logits
        torch.testing.assert_close(found, forward_answers(expected, BATCH).logits)
        assert torch.equal(forward_answers(model, BATCH).logits, now)  # both are on again
        assert model.active_adapters == ["default", "second"]
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert not any(".default." in name for name in trainable)


def test_earlier_adapters_experts_are_not_anchored_and_their_record_stays(two_requests, make_trainer, tmp_path):
    model, _ = two_requests
    model.peft_config["default"].provenance = {"forgets": "the first request"}
    trainer = make_trainer(model, max_steps=1, output_dir=str(tmp_path), forgets="the second")
    assert trainer.objective.targets == {1: [2], 2: [4]}
    trainer.train()
    trainer.save_model()
    assert model.peft_config["default"].provenance == {"forgets": "the first request"}
    assert model.peft_config["second"].provenance["forgets"] == "the second"


def test_adapters_that_are_all_trained_are_all_off(two_requests, build):
    model, _ = two_requests
    model.set_requires_grad("default", True)
    found = Reference(model, kind="current").answers(model, BATCH).logits
    torch.testing.assert_close(found, forward_answers(build.model().eval(), BATCH).logits)


def test_one_adapter_is_off_also_where_it_is_frozen(build):
    """Then there is nothing else that the trained model could be compared with than the base."""
    model = build.uoe(build.model())
    edit(model)
    model.requires_grad_(False)
    for kind in ("current", "base"):
        reference = Reference(model, kind=kind)
        assert reference.adapters_left_on == []
        torch.testing.assert_close(
            reference.answers(model, BATCH).logits, forward_answers(build.model().eval(), BATCH).logits
        )


def test_a_model_without_adapters_has_none_left_on(model):
    assert Reference(model).adapters_left_on == []


def test_an_adapter_that_is_trained_in_part_counts_as_trained(two_requests):
    model, _ = two_requests
    assert Reference(model).adapters_left_on == ["default"]
    model.add_adapter("third", UOEConfig(target_experts=[(1, 5)]))
    model.base_model.set_adapter(["default", "second", "third"])
    for name in ("default", "second"):
        model.set_requires_grad(name, False)
    assert Reference(model).adapters_left_on == ["default", "second"]
    next(p for name, p in model.named_parameters() if ".default." in name).requires_grad_(True)
    assert Reference(model).adapters_left_on == ["second"]


def test_words_count_by_their_letters(two_requests, build):
    """A word from a file is another object than the one in the code."""
    model, _ = two_requests
    assert Reference(model, kind="".join(["ba", "se"])).adapters_left_on == []
    (first, second) = Reference(build.model()).compute("".join(["n", "ll"]), BATCH)
    assert first.shape == second.shape == (1,)


def test_adapters_that_stay_on_are_not_trainable_meanwhile(two_requests):
    model, _ = two_requests
    with Reference(model).base_model():
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".default." in name)


def test_a_large_batch_is_looked_up_as_a_small_one(model):
    reference, ids = Reference(model), torch.arange(300)
    batch = {"id": ids, "labels": ids}
    reference.remember("nll", {int(i): torch.tensor([i / 7]) for i in ids})
    torch.testing.assert_close(reference.nll(model, batch), ids / 7)  # nothing else of the batch is needed
    assert "_known" not in repr(reference)  # nor printed: it may hold as many hidden states as there are tokens


def test_both_come_back_after_an_error(two_requests):
    model, _ = two_requests
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(KeyError), Reference(model).base_model():
        raise KeyError
    assert model.active_adapters == ["default", "second"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("loss", ["npo", "dpo", "undial", "kl", "embed_diff", "relative_embed_diff"])
def test_losses_compare_with_the_first_request(two_requests, make_trainer, loss, prefix_cache):
    """Switched off, the second adapter equals the reference: what compares with it is then at its least."""
    model, _ = two_requests
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.zero_()
    name = "retain_loss" if loss in ("kl", "embed_diff", "relative_embed_diff") else "forget_loss"
    options = {"max_steps": 4, "logging_steps": 1, "prefix_cache": prefix_cache, "learning_rate": 0.0, name: loss}
    logs = {}
    for reference in ("current", "base"):
        trainer = make_trainer(model, reference=reference, **options)
        trainer.train()
        logs[reference] = trainer.state.log_history[0]
    if loss in ("npo", "dpo"):
        assert logs["current"]["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert abs(logs["base"]["rewards/margins"]) > 1e-3
    elif loss == "undial":
        assert logs["current"]["loss_forget"] != pytest.approx(logs["base"]["loss_forget"], rel=1e-3)
    else:
        assert logs["current"]["loss_retain"] == pytest.approx(0, abs=1e-6)
        assert logs["base"]["loss_retain"] > 1e-3
