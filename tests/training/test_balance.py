import torch

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
