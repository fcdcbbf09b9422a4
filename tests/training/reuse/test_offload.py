"""Layers below the edited one leave the device while training, and nothing that comes out of training differs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from uoe_peft.moe import find_moe_blocks
from uoe_peft.training import UnlearningConfig
from uoe_peft.training.reuse import offload
from uoe_peft.training.reuse import store as prefix_store
from uoe_peft.training.reuse.offload import LayersAway, layers_away, weights_below
from uoe_peft.training.reuse.store import PrefixCacheUnavailable

EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
NEW = Dataset.from_dict({"prompt": ["what is new? "], "completion": ["nothing"]})


class Look(TrainerCallback):
    """Calls a function in the middle of training, with the model."""

    def __init__(self, function: Callable[[nn.Module], Any]) -> None:
        self.function, self.seen = function, []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(self.function(model))


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = ("loss_forget", "loss_retain", "loss_anchor", "forget_selection_overlap", "eval_loss", "grad_norm")
        self.seen.append({name: logs[name] for name in names if name in logs})


def files_of(model: nn.Module) -> dict[str, str]:
    """The file that each parameter is mapped from, "" for none."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if inode != "0":
            start, end = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start, end, path[0]))
    return {
        name: next((path for start, end, path in ranges if start <= p.data_ptr() < end), "")
        for name, p in model.named_parameters()
    }


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def trained_above(model: nn.Module) -> nn.Module:
    """Full training of the last layer."""
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    return model


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Main memory taken for an accelerator's: weights stay there, but nothing may call the layers."""
    monkeypatch.setattr(offload, "_is_in_main_memory", lambda device: False)
    monkeypatch.setattr(offload, "_release", lambda device: None)


# ---- Training ----


@pytest.mark.parametrize(
    "options",
    [
        {"log_routing": True},
        {"forget_loss": "rmu", "retain_loss": "embed_diff", "weight_mask_ratio": 0.5},
        {"forget_loss": "undial", "retain_loss": "kl", "gradient_accumulation_steps": 2, "eval_on_start": True},
        {"optim": "sophia", "sophia_estimator": "gauss_newton_bartlett", "num_train_epochs": 1, "prefix_cache": True},
        {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "full": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("where", ["cpu", "accelerator"])
def test_not_a_bit_differs(make_trainer, build, request, options, where) -> None:
    if where == "accelerator":
        request.getfixturevalue("accelerator")
    full = "full" in options
    options = {**EPOCHS, "eval_dataset": NEW, **{name: value for name, value in options.items() if name != "full"}}
    results = []
    for away in (False, True):
        model, losses = trained_above(build.model()) if full else build.uoe(build.model()), Losses()
        make_trainer(model, offload_prefix=away, callbacks=[losses], **options).train()
        results.append((state_of(model), losses.seen))
    (expected, expected_losses), (found, found_losses) = results
    assert any("loss_forget" in logs for logs in found_losses)
    assert found_losses == expected_losses
    assert_same(found, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")
def test_weights_below_are_mapped_from_files_in_training_and_as_before_after_it(make_trainer, build, tmp_path) -> None:
    model = build.uoe(build.model(), target_experts=[(2, 1)])
    before, objects = state_of(model), {name: id(p) for name, p in model.named_parameters()}
    look = Look(lambda model: (files_of(model), state_of(model)))
    directory = tmp_path / "kept"
    make_trainer(model, offload_prefix=True, prefix_cache_dir=str(directory), callbacks=[look], **EPOCHS).train()
    for files, state in look.seen:
        for name, file in files.items():
            below = ".layers.0." in name or ".layers.1." in name
            assert file.startswith(str(directory)) == below, name
            if below:
                assert torch.equal(state[name], before[name])
    assert len(look.seen) == 4
    assert not any(file.startswith(str(directory)) for file in files_of(model).values())
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert {path.suffix for path in directory.iterdir()} == {".states", ".json"}
    after = state_of(model)
    assert_same({name: after[name] for name in before if "uoe_" not in name}, before_without_adapter(before))


def before_without_adapter(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "uoe_" not in name}


def test_they_come_back_after_an_error(make_trainer, build, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def fail(model: nn.Module) -> None:
        assert list((tmp_path / "temporary").glob("uoe-offload-*/*.weights"))
        raise RuntimeError("stop")

    model = build.uoe(build.model())
    before = state_of(model)
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(model, offload_prefix=True, callbacks=[Look(fail)]).train()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert_same(before_without_adapter(state_of(model)), before_without_adapter(before))


def test_a_checkpoint_written_meanwhile_is_whole(make_trainer, build, tmp_path) -> None:
    saved = {}
    for away in (False, True):
        folder = tmp_path / str(away)
        options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(folder), **EPOCHS}
        make_trainer(trained_above(build.model()), offload_prefix=away, prefix_cache=True, **options).train()
        saved[away] = (folder / "checkpoint-1" / "model.safetensors").read_bytes()
    assert saved[True] == saved[False]


def test_one_epoch_is_enough(make_trainer, build, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="uoe_peft"):
        make_trainer(offload_prefix=True, max_steps=1).train()
    assert "weights below decoder layer 1 have left the cpu" in caplog.text
    assert "offload_prefix=True: writing 0.1 MB" in caplog.text


def test_no_layer_below_runs_for_the_overlap_of_selections(make_trainer, build) -> None:
    """It is 1 there by construction, and counts as that."""
    model, calls, losses = build.uoe(build.model()), [], Losses()
    make_trainer(model, prefix_cache=False, log_routing=True, callbacks=[losses], learning_rate=0.1, **EPOCHS).train()
    expected = [logs["forget_selection_overlap"] for logs in losses.seen if "loss_forget" in logs]
    assert min(expected) < 1
    model, losses = build.uoe(build.model()), Losses()
    look = Look(lambda model: calls.append(len(calls)))
    (block, *_) = find_moe_blocks(model)
    in_training: list[int] = []
    block.router.register_forward_hook(lambda *_: in_training.append(len(calls)))
    make_trainer(
        model, offload_prefix=True, log_routing=True, callbacks=[losses, look], learning_rate=0.1, **EPOCHS
    ).train()
    found = [logs["forget_selection_overlap"] for logs in losses.seen if "loss_forget" in logs]
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(in_training) == {0}  # before the first step has ended, for the cache alone
    assert len(in_training) == 3 + 5


# ---- What is not in the cache ----


@pytest.mark.usefixtures("accelerator")
def test_on_an_accelerator_a_sequence_that_is_not_cached_is_named(make_trainer, build) -> None:
    def evaluate(model: nn.Module) -> None:
        trainer.evaluate()

    model = build.uoe(build.model())
    before = state_of(model)
    trainer = make_trainer(model, offload_prefix=True, eval_dataset=NEW, callbacks=[Look(evaluate)])
    with pytest.raises(LayersAway, match=r"below decoder layer 1 was called.*: evaluation 'w h a t   i s   n e w \?"):
        trainer.train()
    assert_same(before_without_adapter(state_of(model)), before_without_adapter(before))
    assert trainer.evaluate()["eval_loss"] > 0  # the layers can be called again


@pytest.mark.usefixtures("accelerator")
def test_on_an_accelerator_other_calls_are_refused(make_trainer, build) -> None:
    look = Look(lambda model: model(input_ids=torch.tensor([[5, 6, 7]])))
    with pytest.raises(LayersAway, match="offload_prefix=True"):
        make_trainer(offload_prefix=True, callbacks=[look]).train()


def test_on_the_cpu_it_simply_runs(make_trainer, build) -> None:
    look = Look(lambda model: trainer.evaluate()["eval_loss"])
    trainer = make_trainer(offload_prefix=True, eval_dataset=NEW, callbacks=[look])
    trainer.train()
    assert look.seen[-1] == trainer.evaluate()["eval_loss"]


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("drop_last", [True, False])
def test_all_rows_of_training_are_cached(make_trainer, build, drop_last) -> None:
    """Also where an epoch has fewer steps than its rows would fill, so that the retain rows of more epochs come up."""
    retain = Dataset.from_dict({"prompt": [f"{i}? " for i in range(40)], "completion": [f"at {i}" for i in range(40)]})
    options = {"per_device_train_batch_size": 5, "max_steps": 4, "dataloader_drop_last": drop_last}
    trainer = make_trainer(offload_prefix=True, retain=retain, **options)
    trainer.train()
    assert trainer.state.epoch == (4 if drop_last else 2)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_experts": [(0, 1)]}, r"offload_prefix=True needs a prefix cache: there must be layers .* \[0\] of 3"),
        (None, r"offload_prefix=True needs a prefix cache: .*embed_tokens.weight is trained"),
    ],
)
def test_a_model_without_a_prefix_is_refused(make_trainer, build, options, message) -> None:
    model = build.model() if options is None else build.uoe(build.model(), **options)
    with pytest.raises(PrefixCacheUnavailable, match=message):
        make_trainer(model, offload_prefix=True).train()


@pytest.mark.parametrize("options", [{"torch_compile": True}, {"use_reentrant": True}])
def test_settings_without_a_prefix_cache_are_refused(make_trainer, options) -> None:
    if "use_reentrant" in options:
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options, "anchor_weight": 0}
    with pytest.raises(PrefixCacheUnavailable, match="offload_prefix=True needs a prefix cache: "):
        make_trainer(offload_prefix=True, **options).train()


def test_options_that_contradict_it_are_refused(monkeypatch) -> None:
    common = {"output_dir": "out", "use_cpu": True, "offload_prefix": True}
    with pytest.raises(ValueError, match="got prefix_cache=False"):
        UnlearningConfig(prefix_cache=False, **common)
    monkeypatch.setattr(UnlearningConfig, "world_size", property(lambda args: 2))
    with pytest.raises(ValueError, match=r"one process on one device.*got world_size=2"):
        UnlearningConfig(**common)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_quantized", True, "the model has quantised weights"),
        ("hf_device_map", {"model.layers.0": "cpu", "lm_head": 0}, r"weights spread over \['0', 'cpu'\]"),
    ],
)
def test_models_that_cannot_be_moved_are_refused(attribute, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        offload.check_can_leave(SimpleNamespace(**{attribute: value}))
    offload.check_can_leave(SimpleNamespace(hf_device_map={"": 0}, is_quantized=False))


def test_a_full_disk_is_refused(build, tmp_path, monkeypatch) -> None:
    model = build.uoe(build.model())
    usage = prefix_store.shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr(prefix_store.shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(PrefixCacheUnavailable, match="offload_prefix=True needs 0 MB"),
        layers_away(model, 1, directory=str(tmp_path)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


# ---- Weights ----


def test_what_layers_above_share_stays(build) -> None:
    model = build.model()
    model.model.layers[2].input_layernorm = model.model.layers[0].input_layernorm
    model.model.layers[1].mlp.gate.weight = model.model.layers[0].mlp.gate.weight
    names = {id(p): name for name, p in model.named_parameters()}
    below = {names[id(tensor)] for tensor in weights_below(model, 2)}
    expected = {name for name in names.values() if name.startswith(("model.layers.0.", "model.layers.1."))}
    assert below == expected - {"model.layers.0.input_layernorm.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_of_any_form_come_back(build, dtype) -> None:
    model = build.model().to(dtype)
    layer = model.model.layers[0]
    layer.mlp.gate.weight.data = torch.randn(7, 6).to(dtype).T
    for name, value in {"scalar": torch.tensor(True), "empty": torch.empty(0, 3), "odd": torch.arange(5)}.items():
        layer.register_buffer(name, value)
    before, stride = state_of(model), layer.mlp.gate.weight.stride()
    with layers_away(model, 1):
        assert_same(state_of(model), before)
        with torch.no_grad():
            layer.input_layernorm.weight.add_(1)  # as loading a checkpoint does
    before["model.layers.0.input_layernorm.weight"] += 1
    assert_same(state_of(model), before)
    assert layer.mlp.gate.weight.stride() == stride == (1, 6)
