import math

import pytest
import torch

from uoe_peft.training.balance import forget_retain_balance


def test_by_hand():
    half = math.log(2)
    assert forget_retain_balance(half, 0.0) == pytest.approx(2 * 0.5 / 1.5)
    assert forget_retain_balance(half, half) == pytest.approx(0.5)


@pytest.mark.parametrize(("forget", "retain"), [(0.0, 0.0), (50.0, 800.0), (math.inf, 0.0), (1.0, math.nan)])
def test_one_side_alone_is_nothing(forget, retain):
    assert forget_retain_balance(forget, retain) < 1e-12


def test_forgetting_all_and_keeping_all_is_one():
    assert forget_retain_balance(50.0, 0.0) == pytest.approx(1.0)


def test_training_ends_with_the_best_checkpoint(make_trainer, uoe_model, sets):
    forget, retain = sets
    trainer = make_trainer(
        uoe_model,
        eval_dataset={"forget": forget, "retain": retain},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=4,
        learning_rate=0.1,
        retain_weight=0.1,
        load_best_model_at_end=True,
        metric_for_best_model="balance",
    )
    kept = {}
    evaluate = trainer.evaluate

    def watch(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        if "eval_balance" in metrics:
            expected = forget_retain_balance(metrics["eval_forget_loss"], metrics["eval_retain_loss"])
            assert metrics["eval_balance"] == expected
            weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
            kept[metrics["eval_balance"]] = (trainer.state.global_step, weights)
        return metrics

    trainer.evaluate = watch
    trainer.train()
    assert len(kept) == 4
    step, weights = kept[max(kept)]
    assert trainer.state.best_global_step == step
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, weights[name])
    assert sum("eval_balance" in log for log in trainer.state.log_history) == 4
