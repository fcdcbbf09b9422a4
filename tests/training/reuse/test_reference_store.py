"""What the base model says is asked once, kept beside the prefix cache, and never stale."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from uoe_peft.training.objective.reference import Reference
from uoe_peft.training.reuse import reference_store
from uoe_peft.training.reuse.reference_store import keep_reference
from uoe_peft.training.reuse.store import PrefixCacheUnavailable, StateFolder, StateStore, open_store
from uoe_peft.training.reuse.store_key import reference_weights, weights_key
from uoe_peft.tuner import UOEConfig, UOELayer

HIDDEN = {"forget_loss": "rmu", "retain_loss": "embed_diff", "rmu_layer": 1}
EPOCHS = {"max_steps": -1, "num_train_epochs": 3}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss_forget" in logs:
            self.seen.append({name: value for name, value in logs.items() if name.startswith("loss_")})


class Asked:
    """How many batches the base model was asked about, before training and in its steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before = self.in_steps = 0
        compute, answers, hidden = Reference.compute, Reference.answers, Reference._hidden_states

        def count_compute(reference: Reference, *args: Any) -> list[Tensor]:
            self.before, in_steps = self.before + 1, self.in_steps
            values = compute(reference, *args)
            self.in_steps = in_steps
            return values

        def count_answers(reference: Reference, *args: Any) -> Any:
            self.in_steps += 1
            return answers(reference, *args)

        def count_hidden(reference: Reference, *args: Any) -> Tensor:
            self.in_steps += 1
            return hidden(reference, *args)

        monkeypatch.setattr(Reference, "compute", count_compute)
        monkeypatch.setattr(Reference, "answers", count_answers)
        monkeypatch.setattr(Reference, "_hidden_states", count_hidden)

    def take(self) -> tuple[int, int]:
        counts, self.before, self.in_steps = (self.before, self.in_steps), 0, 0
        return counts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def losses_of(make_trainer: Any, model: Any = None, **options: Any) -> list[dict[str, float]]:
    losses = Losses()
    make_trainer(model, callbacks=[losses], **{**EPOCHS, **options}).train()
    return losses.seen


# ---- Training ----


@pytest.mark.parametrize("kept", [True, False])
def test_hidden_states_are_asked_for_once_where_the_cache_runs(make_trainer, asked, tmp_path, kept) -> None:
    expected = losses_of(make_trainer, prefix_cache=False, **HIDDEN)
    assert asked.take() == (0, 2 * 6)  # forget and retain batch of 2 steps in each of 3 epochs
    found = losses_of(make_trainer, prefix_cache_dir=str(tmp_path / "kept") if kept else None, **HIDDEN)
    assert asked.take() == (2 + 3, 0)  # 8 and 11 rows in batches of 4
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=1e-3, abs=1e-5)


def test_without_a_folder_one_epoch_asks_in_its_steps(make_trainer, asked, tmp_path) -> None:
    losses_of(make_trainer, num_train_epochs=1, prefix_cache=True, **HIDDEN)
    assert asked.take() == (0, 2 * 2)
    losses_of(make_trainer, num_train_epochs=1, prefix_cache_dir=str(tmp_path / "kept"), **HIDDEN)
    assert asked.take() == (2 + 2, 0)  # of the 11 retain rows, only the 8 that one epoch sees


def test_later_runs_with_other_adapters_seeds_and_losses_find_it(make_trainer, build, asked, tmp_path) -> None:
    options = {"prefix_cache_dir": str(tmp_path / "kept"), "retain_loss": "embed_diff", "rmu_layer": 1}
    losses_of(make_trainer, forget_loss="npo", **options)
    assert asked.take() == (2 + 3, 0)
    torch.manual_seed(1)
    other = build.uoe(build.model(), delta_type="low_rank", r=2)
    losses_of(make_trainer, other, forget_loss="npo", seed=5, **options)
    assert asked.take() == (0, 0)
    losses_of(make_trainer, forget_loss="rmu", **options)
    assert asked.take() == (2, 0)  # the retain states are there


@pytest.mark.parametrize("change", ["weight above", "layer", "labels", "experts"])
def test_what_is_stale_is_computed_anew(make_trainer, build, asked, tmp_path, change) -> None:
    options = {"prefix_cache_dir": str(tmp_path / "kept"), "forget_loss": "grad_ascent", "retain_loss": "embed_diff"}
    forget = Dataset.from_dict({"input_ids": [[5 + i, 6, 7, 8] for i in range(4)]})
    retain = Dataset.from_dict({"input_ids": [[15 + i, 6, 7, 8] for i in range(4)]})
    sets = {"forget": forget, "retain": retain}
    losses_of(make_trainer, **options, **sets, rmu_layer=1)
    assert asked.take() == (1, 0)
    model, layer_idx = build.uoe(build.model()), 1
    match change:
        case "weight above":
            with torch.no_grad():
                model.base_model.model.model.layers[2].input_layernorm.weight[3] += 1e-6
        case "layer":
            layer_idx = 2
        case "labels":
            labels = [[-100, -100, 7, 8]] * 4
            sets["retain"] = retain.add_column("labels", labels)
        case "experts":
            with torch.no_grad():
                model.base_model.model.model.layers[1].mlp.experts.base_layer.down_proj[0, 0, 0] += 1
    losses_of(make_trainer, model, **options, **sets, rmu_layer=layer_idx)
    assert asked.take() == (1, 0)
    assert len(list((tmp_path / "kept").glob("*.states"))) == 3  # what enters the edited layer is the same


@pytest.mark.parametrize("kept", [True, False])
def test_resuming_gives_the_same_bits(make_trainer, build, asked, tmp_path, kept) -> None:
    directory = str(tmp_path / "kept") if kept else None
    options = {**HIDDEN, "prefix_cache_dir": directory, "save_strategy": "steps", "save_steps": 3}
    model, losses = build.uoe(build.model()), Losses()
    expected = losses_of(make_trainer, model, **options)
    asked.take()
    resumed = make_trainer(callbacks=[losses], **EPOCHS, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert asked.take() == (0 if kept else 2 + 3, 0)
    assert losses.seen == expected[3:]
    for now, before in zip(resumed.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(now, before)


def test_a_model_trained_in_full_keeps_it_in_the_folder_too(make_trainer, build, asked, tmp_path) -> None:
    options = {**HIDDEN, "prefix_cache_dir": str(tmp_path / "kept")}
    expected = losses_of(make_trainer, build.model(), **HIDDEN)
    assert losses_of(make_trainer, build.model(), **options) == expected
    asked.take()
    assert losses_of(make_trainer, build.model(), **options) == expected
    assert asked.take() == (0, 0)


def test_a_full_disk_leaves_training_as_it_was(make_trainer, asked, tmp_path, monkeypatch, caplog) -> None:
    def refuse(*args: Any, **kwargs: Any) -> StateStore:
        raise PrefixCacheUnavailable("no room")

    monkeypatch.setattr(reference_store, "write_store", refuse)
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        losses_of(make_trainer, **HIDDEN)
    assert "not kept on disk: no room" in caplog.text
    assert asked.take() == (1, 2 * 6)
    with pytest.raises(PrefixCacheUnavailable, match="no room"):
        losses_of(make_trainer, prefix_cache=True, **HIDDEN)


# ---- Files ----


ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "id": 33},
    {"input_ids": [9, 10, 11], "labels": [-100, -100, 11], "id": 11},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "id": 33},
]


def keep(model: Any, directory: Path, rows: Any = ROWS, *, need: Any = "hidden") -> Reference:
    reference = Reference(model, hidden_layer=1)

    def batches(rows: Any) -> Any:
        for row in rows:
            yield {name: torch.tensor([row[name]]) for name in ("input_ids", "labels", "id")} | {
                "attention_mask": torch.ones(1, len(row["input_ids"]), dtype=torch.int64)
            }

    folder = StateFolder(directory)
    keep_reference(reference, rows, need=need, folder=folder, weights=lambda: "weights", batches=batches)
    return reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_kept_in_their_dtype_at_answer_tokens_and_once(build, tmp_path, dtype) -> None:
    model = build.uoe(build.model().to(dtype))
    reference = keep(model, tmp_path)
    (path,) = tmp_path.glob("*.states")
    assert path.stat().st_size == (3 + 1) * 32 * dtype.itemsize
    store = open_store(tmp_path, path.stem)
    assert store is not None
    batch = {"id": torch.tensor([33, 11]), "labels": torch.zeros(2, 4)}
    expected = torch.cat([store.states(name) for name in ("33", "11")])
    assert torch.equal(reference.hidden(model, batch), expected)


def test_likelihoods_come_back_as_they_were_computed(build, tmp_path, asked) -> None:
    model = build.uoe(build.model())
    computed, found = (keep(model, tmp_path, need="nll") for _ in range(2))
    assert asked.take() == (2, 0)
    batch = {"id": torch.tensor([11, 33]), "labels": torch.zeros(2, 4)}
    values = found.nll(model, batch)
    assert values.shape == (2,) and values.dtype == torch.float32
    assert torch.equal(values, computed.nll(model, batch))


def test_the_key_is_of_the_base_weights_not_of_adapters(build) -> None:
    def key(model: Any) -> str:
        described, weights = reference_weights(model)
        return weights_key(model, weights, described, context=torch.no_grad)

    torch.manual_seed(1)
    models = [build.uoe(build.model()), build.uoe(build.model(), delta_type="low_rank", r=2)]
    with torch.no_grad():
        for parameter in models[0].parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert key(models[0]) == key(models[1])
    for part in ("lm_head", "model.layers.2.mlp.gate", "model.layers.1.mlp.gate.base_layer"):
        changed = build.uoe(build.model())
        with torch.no_grad():
            changed.get_base_model().get_submodule(part).weight[0, 0] += 1e-6
        assert key(changed) != key(models[0]), part


def test_the_key_is_also_of_the_adapters_that_stay_on(build) -> None:
    """Of what they are and where: two deltas of the same shapes may edit different experts."""

    def key(expert: int, *, value: float = 0.5, scale: float = 1.0, second: float = 0.0, on: Any = ("default",)) -> str:
        model = build.uoe(build.model(), target_experts=[(1, expert)], train_router=False)
        model.add_adapter("second", UOEConfig(target_experts=[(2, 3)]))
        for name, parameter in model.named_parameters():
            if "uoe_" in name:
                torch.nn.init.constant_(parameter, value if ".default." in name else second)
        for layer in model.modules():
            if isinstance(layer, UOELayer):
                layer.set_scale("default", scale)
        described, weights = reference_weights(model, on)
        return weights_key(model, weights, described, context=torch.no_grad)

    assert key(2) == key(2) == key(2, second=9.0)
    others = [key(4), key(2, value=0.25), key(2, scale=0.5), key(2, on=()), key(2, on=("default", "second"))]
    assert len({key(2), *others}) == 6
    assert key(2, on=()) == key(2, value=0.25, on=())
