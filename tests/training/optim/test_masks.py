import pytest
import torch
from torch import nn

from uoe_peft.data import collate
from uoe_peft.training import processes
from uoe_peft.training.optim.masks import edited_weights, weight_attribution_mask

FORGET = collate([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}], pad_token_id=0)
RETAIN = collate([{"input_ids": [15, 16, 17], "labels": [-100, 16, 17]}], pad_token_id=0)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain_gradients(model, batch):
    """Of the same weights in a model without an adapter, by transformers' own loss."""
    loss = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    mlp = model.model.layers[1].mlp
    parameters = [mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight]
    up, down, gate = torch.autograd.grad(loss, parameters)
    return up[2], down[2], gate


@pytest.mark.parametrize("with_retain", [True, False])
def test_the_mask_is_wagles(build, with_retain):
    base = build.model().eval()
    mlp = base.model.layers[1].mlp
    theta = [p.detach().clone() for p in (mlp.experts.gate_up_proj[2], mlp.experts.down_proj[2], mlp.gate.weight)]
    mu, ratio = 0.01, 0.3
    pairs = zip(theta, plain_gradients(base, FORGET), plain_gradients(base, RETAIN), strict=True)
    scores = [((t - (r / mu if with_retain else 0)) * f).abs().flatten() for t, f, r in pairs]
    number = round(ratio * sum(map(len, scores)))
    expected = torch.cat(scores) >= torch.cat(scores).topk(number).values[-1]
    masks = weight_attribution_mask(build.uoe(base), [FORGET], [RETAIN] if with_retain else None, ratio=ratio, mu=mu)
    order = {"gate_up_proj": 0, "down_proj": 1, "weight": 2}
    parts = sorted(masks, key=lambda name: order[name.split(".")[-1]])
    found = torch.cat([masks[name].flatten() for name in parts])
    assert found.sum() == number
    assert (found == expected).float().mean() > 0.999  # gradients of the two paths differ in their last bits


def test_base_and_delta_together_are_the_weight(uoe_model):
    with torch.no_grad():
        for parameter in trainable(uoe_model).values():
            parameter.normal_()
    values = edited_weights(uoe_model)
    merged = uoe_model.merge_and_unload().model.layers[1].mlp
    expected = [merged.experts.gate_up_proj[2], merged.experts.down_proj[2], merged.gate.weight]
    for value in values.values():
        assert any(e.shape == value[0].shape and torch.allclose(e, value[0]) for e in expected)
    assert len(values) == 3


def test_gradients_and_mode_are_left_alone(uoe_model):
    uoe_model.train()
    weight_attribution_mask(uoe_model, [FORGET], None, ratio=0.5)
    assert uoe_model.training
    assert all(p.grad is None for p in uoe_model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 0.5, "mu": 0.0}, "mu must be > 0"),
    ],
)
def test_bad_numbers_are_refused(uoe_model, options, message):
    with pytest.raises(ValueError, match=message):
        weight_attribution_mask(uoe_model, [FORGET], None, **options)


def test_a_frozen_model_has_nothing_to_mask(model):
    with pytest.raises(ValueError, match="no trainable parameter"):
        weight_attribution_mask(model.requires_grad_(False), [FORGET], None, ratio=0.5)


def test_a_gradient_that_is_not_finite_is_named(uoe_model):
    parameter = next(iter(trainable(uoe_model).values()))
    nn.init.constant_(parameter, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        weight_attribution_mask(uoe_model, [FORGET], None, ratio=0.5)


@pytest.mark.parametrize("low_rank", ["lora", "delta_type", "router_delta_type"])
def test_a_factor_without_gradient_is_refused_rather_than_frozen_for_ever(build, low_rank):
    options = {} if low_rank == "lora" else {low_rank: "low_rank", "r": 3}
    model = build.lora(build.model()) if low_rank == "lora" else build.uoe(build.model(), **options)
    with pytest.raises(ValueError, match=r"would freeze .*_A\..* for ever: it has no gradient"):
        weight_attribution_mask(model, [FORGET], None, ratio=0.5)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    assert weight_attribution_mask(model, [FORGET], None, ratio=0.5).keys() == trainable(model).keys()


def test_processes_take_the_first_ones_mask(make_trainer, uoe_model, monkeypatch):
    """Two processes whose gradients differ in a last bit would else move different weights."""
    said = {}

    def broadcast(mask, from_process=0):
        assert from_process == 0
        said[len(said)] = torch.zeros_like(mask)
        return said[len(said) - 1]

    monkeypatch.setattr(processes, "broadcast", broadcast)
    trainer = make_trainer(uoe_model, weight_mask_ratio=0.5, max_steps=1)
    before = start(trainer)
    trainer.train()
    assert len(said) == len(before) == 3
    assert all(torch.equal(p, before[name]) for name, p in trainable(trainer.model).items())


# ---- Through training ----


def start(trainer):
    return {name: p.detach().clone() for name, p in trainable(trainer.model).items()}


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "sophia"])
@pytest.mark.parametrize("kind", ["uoe", "lora", "all"])
def test_masked_weights_do_not_move_by_a_bit(make_trainer, build, optim, kind):
    model = build.model() if kind == "all" else getattr(build, kind)(build.model())
    trainer = make_trainer(model, optim=optim, weight_mask_ratio=0.25, weight_decay=0.5, learning_rate=0.1, max_steps=3)
    if kind != "all":
        with torch.no_grad():  # a delta of zeros would not show weight decay; a fresh low-rank one is refused
            for parameter in trainable(trainer.model).values():
                parameter.normal_(std=0.02)
    before, masks = start(trainer), {}
    trainer.callback_handler.on_step_end = lambda *args: masks.update(trainer._keep_masked.masks) or args[-1]
    trainer.train()
    moved = {name: p != before[name] for name, p in trainable(trainer.model).items()}
    assert not any((moved[name] & ~masks[name]).any() for name in masks)
    share = sum(int(m.sum()) for m in moved.values()) / sum(m.numel() for m in moved.values())
    assert 0.1 < share <= 0.2501


def test_the_gradient_norm_is_of_the_weights_that_move(make_trainer, build):
    norms = []
    for ratio in (None, 1.0, 0.01):
        trainer = make_trainer(build.uoe(build.model()), weight_mask_ratio=ratio, max_steps=1)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == norms[1] > norms[2] > 0


def test_resuming_goes_on_with_the_same_mask(make_trainer, build, tmp_path):
    options = {"weight_mask_ratio": 0.3, "weight_decay": 0.1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(build.uoe(build.model()), **options)
    whole.train()
    resumed = make_trainer(build.uoe(build.model()), **options)
    resumed._keep_masked._compute = None  # it must come from the checkpoint: later gradients would give another
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_a_checkpoint_without_a_mask_is_refused(make_trainer, build, tmp_path):
    make_trainer(build.uoe(build.model()), save_strategy="steps", save_steps=1).train()
    masked = make_trainer(build.uoe(build.model()), weight_mask_ratio=0.3)
    with pytest.raises(FileNotFoundError, match="trained without weight_mask_ratio"):
        masked.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_training_again_takes_a_new_mask_and_leaves_no_hooks(make_trainer, uoe_model):
    trainer = make_trainer(uoe_model, weight_mask_ratio=0.3, max_steps=1)
    for _ in range(2):
        trainer.train()
        assert trainer._keep_masked.masks is None
        assert not any(p._backward_hooks for p in trainable(trainer.model).values())
