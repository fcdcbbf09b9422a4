"""Training a model whose layers are on several devices (`device_map`), against the same training on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.pretend_devices import device, pretend_devices, spread
from uoe_peft.training import UnlearningConfig
from uoe_peft.training.step_log import mean_over_processes
from uoe_peft.tuner import UOEConfig

NAMES = ("loss_forget", "loss_retain", "loss_anchor", "grad_norm", "target_activation_rate", "forget_accuracy")
OPTIONS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


def trained(make_trainer: Any, model: Any, **options: Any) -> tuple[list[dict[str, float]], list[torch.Tensor], Any]:
    trainer = make_trainer(model, **OPTIONS, **options)
    trainer.train()
    logs = [{name: log[name] for name in NAMES if name in log} for log in trainer.state.log_history[:-1]]
    return logs, [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad], trainer


def on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go to the first device, as they do with accelerators."""
    real = UnlearningConfig.device
    # Asking for the device also sets up what is known of the processes.
    monkeypatch.setattr(UnlearningConfig, "device", property(lambda args: (real.fget(args), device(0))[1]))
    monkeypatch.setattr(Accelerator, "device", property(lambda accelerator: device(0)))


def assert_same(found: Any, expected: Any) -> None:
    assert len(found[0]) == len(expected[0]) == 4
    for log, other in zip(found[0], expected[0], strict=True):
        assert log == pytest.approx(other, rel=1e-3, abs=1e-5)
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4, check_device=False)


@pytest.mark.parametrize(
    "options",
    [
        {"forget_loss": "npo", "log_routing": True},
        {"forget_loss": "rmu", "retain_loss": "embed_diff"},
        {"forget_loss": "grad_ascent", "weight_mask_ratio": 0.5, "prefix_cache": False},
    ],
)
def test_training_is_that_of_one_device(make_trainer, build, monkeypatch, options):
    def model() -> Any:
        return build.uoe(build.model(), target_experts=[(2, 4)])  # beyond the cut, as what enters it

    expected = trained(make_trainer, model(), **options)
    with pretend_devices(monkeypatch):
        on_two(monkeypatch)
        edited = model()
        spread(edited.get_base_model(), last=1)
        found = trained(make_trainer, edited, **options)
        assert_same(found, expected)


def test_what_comes_from_memory_and_disk_is_put_where_batches_are(make_trainer, build, monkeypatch):
    with pretend_devices(monkeypatch):
        on_two(monkeypatch)
        model = build.uoe(build.model(), target_experts=[(2, 4)])
        spread(model.get_base_model(), last=1)
        trainer = make_trainer(model, max_steps=4, forget_loss="rmu", prefix_cache=True)
        rows = trainer.data_collator([trainer.train_dataset[i] for i in (0, 5)])["forget"]
        here, there = ({name: value.to(device(place)) for name, value in rows.items()} for place in (0, 1))
        objective = trainer.objective
        objective.reference.precompute([here])
        with trainer.reuse.training(objective):
            state = trainer.reuse._cache.state({name: here[name] for name in ("input_ids", "attention_mask")})
        found = {
            "direction of rmu": objective.direction,
            "likelihoods of the reference": objective.reference.nll(model, here),
            "state below the edited layer": state[0] if isinstance(state, tuple) else state,
            "counts of a batch": trainer._count([{"forget": there}], "forget").tokens,
        }
        assert {name: value.device for name, value in found.items()} == dict.fromkeys(found, device(0))
        values = {"here": torch.ones(()).to(device(0)), "there": torch.ones(()).to(device(1))}
        assert mean_over_processes(values, trainer.accelerator) == {"here": 1.0, "there": 1.0}


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
@pytest.mark.parametrize("score", ["gate", "ablation"])
def test_auto_finds_the_expert_of_one_device(make_trainer, build, monkeypatch, score):
    options = {"peft_config": UOEConfig(target_experts="auto"), "attribution_score": score}
    expected = make_trainer(build.model(), **options).model.peft_config["default"]
    with pretend_devices(monkeypatch):
        on_two(monkeypatch)
        base = build.model()
        spread(base, last=0)
        found = make_trainer(base, **options).model.peft_config["default"]
    assert found.target_experts == expected.target_experts
    assert found.attribution == expected.attribution
