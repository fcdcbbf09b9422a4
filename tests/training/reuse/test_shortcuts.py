"""Shortcuts leave out work, and change nothing."""

import logging
from typing import get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model

from uoe_peft.training.choices import ForgetLoss
from uoe_peft.training.reuse import shortcuts

RMU = {"forget_loss": "rmu", "retain_loss": "embed_diff"}
VOCAB = 97


def count_calls(model, layer_idx):
    calls = []
    model.get_base_model().model.layers[layer_idx].register_forward_pre_hook(lambda *_: calls.append(layer_idx))
    return calls


def trained(make_trainer, build, model=None, **options):
    keep = build.keep_gradients()
    trainer = make_trainer(build.uoe(build.model()) if model is None else model, callbacks=[keep], **options)
    trainer.train()
    return trainer, keep.gradients


@pytest.mark.parametrize("anchor_weight", [0.0, 1.0])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_rmu_runs_nothing_above_its_layer(make_trainer, build, prefix_cache, anchor_weight):
    options = {**RMU, "max_steps": 6, "logging_steps": 4, "prefix_cache": prefix_cache, "anchor_weight": anchor_weight}
    model = build.uoe(build.model())
    above, head = count_calls(model, 2), []
    model.get_output_embeddings().register_forward_hook(lambda head_, args, output: head.append(output.numel()))
    trainer, gradients = trained(make_trainer, build, model, **options)
    # Tried once (and by the cache twice); then forget and retain batch at the fourth step, which is logged.
    assert len(above) == (5 if prefix_cache else 3)
    assert sum(size > 0 for size in head) == 2
    whole, expected = trained(make_trainer, build, **{**options, "logging_steps": 1})
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[name]), name
    for now, before in zip(trainer.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(now, before)


def test_accuracy_is_logged_of_the_steps_that_are_logged(make_trainer, build):
    trainer, _ = trained(make_trainer, build, **RMU, max_steps=4, logging_steps=2)
    every, _ = trained(make_trainer, build, **RMU, max_steps=4, logging_steps=1)
    logs, all_logs = ([row for row in t.state.log_history if "loss_forget" in row] for t in (trainer, every))
    for row, expected in zip(logs, all_logs[1::2], strict=True):
        for name in ("forget_accuracy", "retain_nll"):
            assert row[name] == pytest.approx(expected[name])


@pytest.mark.parametrize("strategy", [{"logging_strategy": "epoch"}, {"logging_steps": 3, "logging_first_step": True}])
def test_every_log_has_accuracies(make_trainer, build, strategy):
    trainer, _ = trained(make_trainer, build, **RMU, max_steps=-1, num_train_epochs=6, **strategy)
    logs = [row for row in trainer.state.log_history if "loss_forget" in row]
    assert len(logs) > 4
    assert all("forget_accuracy" in row for row in logs)


def test_the_anchor_of_a_higher_layer_is_still_read(make_trainer, build):
    model = build.uoe(build.model(), target_experts=[(0, 1), (1, 3)])
    above = count_calls(model, 2)
    options = {**RMU, "rmu_layer": 0, "max_steps": 3, "logging_steps": 50}
    trainer, gradients = trained(make_trainer, build, model, **options)
    assert trainer.objective.reference.last_layer == 1
    assert len(above) == 1
    assert any(gradient.any() for name, gradient in gradients.items() if "layers.1.mlp.gate" in name)


def test_a_layer_below_all_that_is_edited_is_refused(make_trainer, build):
    with pytest.raises(ValueError, match=r"rmu_layer=0 is below every layer that is trained, \[1\]"):
        make_trainer(**RMU, rmu_layer=0)
    lora = LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[2])
    with pytest.raises(ValueError, match=r"rmu_layer=1 is below every layer that is trained, \[2\]"):
        make_trainer(get_peft_model(build.model(), lora), **RMU, rmu_layer=1)


def test_a_model_that_cannot_stop_runs_in_full(make_trainer, build, caplog):
    model = build.uoe(build.model())
    calls = count_calls(model, 2)
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_hook(lambda layer, args, output: output + 1e-3 * len(calls))
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        trainer, _ = trained(make_trainer, build, model, **RMU, logging_steps=50)
    assert trainer.objective.reference.last_layer is None
    assert "cannot end a pass at layer 1" in caplog.text


@pytest.mark.parametrize("forget_loss", get_args(ForgetLoss))
def test_every_loss_is_the_same_from_chunks_of_logits(make_trainer, build, monkeypatch, forget_loss):
    retain = {"undial": "kl", "rmu": "embed_diff"}.get(forget_loss, "nll")
    options = {"forget_loss": forget_loss, "retain_loss": retain, "seed": 3}
    _, expected = trained(make_trainer, build, **options)
    monkeypatch.setattr(shortcuts, "LOGITS_AT_ONCE", 3 * VOCAB)
    model = build.uoe(build.model())
    sizes = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, output: sizes.append(output[0].shape[-2]))
    trainer, gradients = trained(make_trainer, build, model, **options)
    assert trainer.objective.reference.logits_at_once == 3 * VOCAB
    assert sizes.count(3) > 2
    assert sum(size > 3 for size in sizes) == 2  # the head is tried in two ways
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_head_that_cannot_be_applied_in_chunks_is_said_once(make_trainer, build, monkeypatch, caplog):
    monkeypatch.setattr(shortcuts, "LOGITS_AT_ONCE", 3 * VOCAB)
    monkeypatch.setattr(shortcuts, "head_is_exact", lambda model, batch: False)
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        trainer, _ = trained(make_trainer, build)
    assert trainer.objective.reference.logits_at_once is None
    assert caplog.text.count("cannot be applied in chunks") == 1


def test_what_differentiates_twice_gets_all_logits_at_once(make_trainer, build, monkeypatch):
    monkeypatch.setattr(shortcuts, "LOGITS_AT_ONCE", 3 * VOCAB)
    options = {"optim": "sophia", "sophia_estimator": "hutchinson", "sophia_interval": 1}
    trainer, gradients = trained(make_trainer, build, **options)
    assert trainer.objective.reference.logits_at_once is None
    assert any(gradient.any() for gradient in gradients.values())
