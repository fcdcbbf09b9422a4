"""What an objective asks of the model and of its reference is what its losses read, and no more."""

import inspect
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch

from tests.training.conftest import make_args
from uoe_peft.moe.routing import record_routing
from uoe_peft.training.objective.objective import Objective

NLL, HIDDEN = {"forget": "nll"}, {"forget": "hidden"}
# What to ask beforehand: where examples come once, again, or are kept on disk; and of a model that is trained in full.
NEEDS = [
    ({"forget_loss": "npo"}, {}, NLL, NLL, NLL),
    ({"forget_loss": "dpo"}, {}, *3 * [{**NLL, "alternative": "nll"}]),
    ({"forget_loss": "idk"}, {}, {}, {}, {}),
    ({"forget_loss": "rmu"}, {}, {}, HIDDEN, HIDDEN),
    ({"forget_loss": "rmu", "rmu_coefficient": 4.0}, {}, {}, {}, {}),
    ({"forget_loss": "wga", "retain_loss": "embed_diff"}, {}, {}, {"retain": "hidden"}, {"retain": "hidden"}),
    ({"forget_loss": "wga", "retain_loss": "embed_diff", "retain_weight": 0}, {}, {}, {}, {}),
    ({"forget_loss": "wga", "retain_loss": "relative_embed_diff"}, {}, {}, {"retain": "hidden"}, {"retain": "hidden"}),
]


def objective(*, has_adapter=True, **options):
    # Strings as a parser makes them: equal to the code's own, but not the same objects.
    options = {name: "".join(value) if isinstance(value, str) else value for name, value in options.items()}
    return Objective(make_args(**options), SimpleNamespace(has_adapter=has_adapter, hidden_layer=3), targets={})


@pytest.mark.parametrize(("options", "once", "again", "on_disk", "in_full"), NEEDS)
def test_the_base_is_asked_beforehand_where_that_saves_a_pass(options, once, again, on_disk, in_full):
    needs = objective(**options).reference_needs
    assert needs(examples_come_again=False, on_disk=False) == once
    assert needs(examples_come_again=True, on_disk=False) == again
    assert needs(examples_come_again=False, on_disk=True) == on_disk
    assert objective(has_adapter=False, **options).reference_needs(examples_come_again=False, on_disk=False) == in_full


@pytest.mark.parametrize("forget_loss", ["npo", "rmu", "wga"])
@pytest.mark.parametrize("retain_loss", ["embed_diff", "relative_embed_diff", "kl", "nll", "none"])
def test_hidden_states_are_kept_for_losses_that_read_them(forget_loss, retain_loss):
    found = objective(forget_loss=forget_loss, retain_loss=retain_loss)
    assert found.forget_layer == (3 if forget_loss == "rmu" else None)
    assert found.retain_layer == (3 if "embed_diff" in retain_loss else None)


@pytest.mark.parametrize(("hidden", "direction"), [(None, torch.ones(4)), (torch.ones(3, 4), None)])
def test_rmu_says_what_it_lacks(hidden, direction):
    found = replace(objective(forget_loss="rmu", rmu_coefficient=1.0), direction=direction)
    with pytest.raises(RuntimeError, match="rmu needs hidden states and a direction"):
        found.forget(None, {"forget": {}}, SimpleNamespace(hidden=hidden), {}, {})


def test_options_are_passed_by_name():
    names = {
        "step": ["with_likelihood"],
        "reference_needs": ["examples_come_again", "on_disk"],
        "retain": ["token_weights"],
    }
    for method, expected in names.items():
        parameters = inspect.signature(getattr(Objective, method)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == expected


def test_an_objective_is_not_changed_while_it_is_used():
    with pytest.raises(FrozenInstanceError):
        objective().targets = {1: [2]}


def step_of(trainer, **options):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 3, 5)])
    with record_routing(trainer.model, layer_indices=[1]) as trace:
        return batch, trainer.objective.step(trainer.model, batch, trace, {}, **options)


def test_terms_of_weight_zero_are_not_computed(make_trainer, build):
    for weight, names in ((0.0, {"forget", "retain"}), (0.1, {"forget", "retain", "anchor"})):
        trainer = make_trainer(build.uoe(build.model()), anchor_weight=weight)
        assert set(step_of(trainer)[1].terms) == names


def test_likelihoods_accuracies_and_rates_are_the_models(make_trainer, build):
    trainer = make_trainer(build.uoe(build.model()))
    batches, step = step_of(trainer)
    for role, rate in (("forget", "target_activation_rate"), ("retain", "retain_activation_rate")):
        log_p, hits, reached = [], [], []
        for ids, labels in zip(batches[role]["input_ids"], batches[role]["labels"], strict=True):
            ids = ids[ids != 0]
            with torch.no_grad():
                outputs = trainer.model(input_ids=ids[None], output_router_logits=True)
            logits = outputs.logits[0]
            reached += [2 in chosen for chosen in outputs.router_logits[1].topk(3).indices.tolist()]
            for t in range(1, len(ids)):
                if labels[t] != -100:
                    log_p.append(logits[t - 1].log_softmax(-1)[labels[t]].item())
                    hits.append(logits[t - 1].argmax().item() == labels[t].item())
        assert step.metrics[f"{role}_nll"].item() == pytest.approx(-sum(log_p) / len(log_p), rel=1e-4)
        assert step.metrics[f"{role}_accuracy"].item() == pytest.approx(sum(hits) / len(hits))
        assert step.metrics[rate].item() == pytest.approx(sum(reached) / len(reached))
        assert not step.metrics[f"{role}_nll"].requires_grad


def test_likelihoods_that_no_loss_needs_can_be_left_out(make_trainer, build):
    trainer = make_trainer(build.uoe(build.model()), forget_loss="rmu", retain_loss="embed_diff", rmu_layer=1)
    trainer.objective = replace(trainer.objective, reference=replace(trainer.objective.reference, last_layer=1))
    measured = {"forget_accuracy", "forget_nll", "retain_accuracy", "retain_nll"}
    assert measured <= set(step_of(trainer)[1].metrics)
    assert not measured & set(step_of(trainer, with_likelihood=False)[1].metrics)
