import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from uoe_peft.evaluation.metrics import forget_retain_balance


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
        if {"eval_balance", "eval_forget_loss"} <= metrics.keys():
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


def test_early_stopping_sees_it(make_trainer, uoe_model, sets):
    trainer = make_trainer(
        uoe_model,
        eval_dataset={"retain": sets[1], "other": sets[1], "forget": sets[0]},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=6,
        learning_rate=0.0,
        load_best_model_at_end=True,
        metric_for_best_model="balance",
    )
    trainer.train()
    assert trainer.state.global_step == 3  # the first is the best, and two are no better
    logged = [entry["eval_balance"] for entry in trainer.state.log_history if "eval_balance" in entry]
    assert len(logged) == 3 and len(set(logged)) == 1


def test_it_is_of_two_sets_that_are_evaluated_together(make_trainer, uoe_model, sets):
    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(sorted(name for name in metrics if name.endswith("balance")))

    trainer = make_trainer(uoe_model, callbacks=[Look()])
    forget, retain = sets
    trainer.evaluate({"forget": forget})
    trainer.evaluate(retain, metric_key_prefix="eval_retain")
    trainer.evaluate({"retain": retain, "forget": forget}, metric_key_prefix="test")
    assert seen == [[], [], [], ["test_balance"]]
