"""What is logged of preferences, against formulas on the plain base model and hand-edited weights."""

import pytest
import torch
import torch.nn.functional as F

from uoe_peft.training.objective.rewards import reward_metrics


def test_by_hand():
    found = reward_metrics(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([2.0, 1.0, -3.0]))
    assert {name: float(value) for name, value in found.items()} == {
        "rewards/rejected": pytest.approx(-1 / 3),
        "rewards/chosen": 0.0,
        "rewards/margins": pytest.approx(1 / 3),  # 1, 3 and -3
        "rewards/accuracies": pytest.approx(2 / 3),
    }


def test_without_a_preferred_answer_the_reference_is_what_is_compared_with():
    found = reward_metrics(torch.tensor([1.0, -2.0, 0.0], requires_grad=True))
    assert "rewards/chosen" not in found and not any(value.requires_grad for value in found.values())
    assert float(found["rewards/margins"]) == pytest.approx(1 / 3)
    assert float(found["rewards/accuracies"]) == pytest.approx(1 / 3)  # a tie is no success


def likelihoods(model, rows):
    """Log-likelihood of each row's answer, row by row."""
    found = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        found.append(-F.cross_entropy(logits, labels[0, 1:], reduction="sum"))
    return torch.stack(found)


@pytest.mark.parametrize("forget_loss", ["npo", "dpo"])
def test_the_log_has_the_rewards_of_the_whole_batch(make_trainer, build, forget_loss):
    model = build.uoe(build.model())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    merged, base = build.uoe(build.model()), build.model().eval()
    merged.load_state_dict(model.state_dict())
    merged = merged.merge_and_unload().eval()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, "beta": 0.3}
    trainer = make_trainer(model, forget_loss=forget_loss, learning_rate=0.0, **options)
    sets = trainer.train_dataset.sets
    rejected = 0.3 * (likelihoods(merged, sets["forget"]) - likelihoods(base, sets["forget"]))
    chosen = torch.zeros(8)
    if forget_loss == "dpo":
        chosen = 0.3 * (likelihoods(merged, sets["alternative"]) - likelihoods(base, sets["alternative"]))
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["rewards/rejected"] == pytest.approx(float(rejected.mean()), rel=1e-3)
    assert logs["rewards/margins"] == pytest.approx(float((chosen - rejected).mean()), rel=1e-3)
    assert logs["rewards/accuracies"] == pytest.approx(float((chosen > rejected).float().mean()))
    if forget_loss == "dpo":
        assert logs["rewards/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-3)
