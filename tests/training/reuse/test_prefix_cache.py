"""Training from the cache is training: the same losses and gradients, and never from a stale or broken cache."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from tests.families import SUPPORTED
from tests.families import build as build_family
from uoe_peft.data import PairedDataset, collate
from uoe_peft.moe import find_moe_blocks
from uoe_peft.training.reuse import store as prefix_store
from uoe_peft.training.reuse.edited import lowest_edited_layer
from uoe_peft.training.reuse.prefix_cache import PrefixSource, cache_key, prefix_cache
from uoe_peft.training.reuse.rows import rows_in_training
from uoe_peft.training.reuse.store import (
    NothingToCache,
    PrefixCacheUnavailable,
    StateFolder,
    open_store,
    write_store,
)

SEQUENCES = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24, 25, 26, 27], [31, 32, 33, 34]]
# The layers of these hand on more than hidden states.
_NOT_KEPT = ("glm_moe_dsa", "hy_v4", "mistral_large4", "zaya")
# Its routers and experts read noisy inputs in training (`input_jitter_noise`).
_NOISY = "phimoe"
# Encoder-decoders, which the trainer gives no decoder inputs; and a configuration that needs tokens that mark images.
_NOT_TRIED = ("nllb_moe", "switch_transformers", "qwen3_omni_moe")


def source_of(model: nn.Module, *, batch_size: int = 3) -> PrefixSource:
    return PrefixSource(
        model=model, batch_size=batch_size, pad_token_id=0, place=lambda batch: batch, context=torch.no_grad
    )


def batch_of(sequences: list[list[int]]) -> dict[str, Any]:
    batch = collate([{"input_ids": ids} for ids in sequences], pad_token_id=0)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def count_calls(model: nn.Module, layer_idx: int) -> list[int]:
    calls: list[int] = []
    (block,) = [block for block in find_moe_blocks(model) if block.layer_idx == layer_idx]
    block.router.register_forward_hook(lambda *_: calls.append(layer_idx))
    return calls


class Losses(TrainerCallback):
    """The losses of every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = ("loss_forget", "loss_retain", "loss_anchor", "forget_selection_overlap", "eval_loss")
        kept = {name: logs[name] for name in names if name in logs}
        if kept:
            self.seen.append(kept)


# ---- Serving ----


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_says_the_same_from_the_cache_without_running_the_layers_below(build, dtype) -> None:
    model = build.uoe(build.model().to(dtype)).eval()
    calls, batch = count_calls(model, 0), batch_of(SEQUENCES)
    whole = model(**batch).logits[batch["attention_mask"].bool()]
    with prefix_cache(source_of(model), SEQUENCES) as cache, cache.serve(model):
        assert cache.store.values.dtype == dtype
        calls.clear()
        part = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    assert calls == []
    assert (part - whole).float().std() < 4 * torch.finfo(dtype).eps * whole.float().std()


@torch.no_grad()
def test_not_a_bit_differs_where_batches_are_those_that_were_cached(build) -> None:
    model, sequences = build.uoe(build.model()).eval(), [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]
    batch = batch_of(sequences)
    whole = model(**batch).logits
    with prefix_cache(source_of(model), sequences) as cache, cache.serve(model):
        assert torch.equal(model(**batch).logits, whole)


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in _NOT_TRIED])
@torch.no_grad()
def test_every_family_is_served_or_refused(family: str) -> None:
    model, batch = build_family(family), batch_of(SEQUENCES)
    layer_idx = find_moe_blocks(model)[-1].layer_idx
    model.requires_grad_(False)
    next(iter(find_moe_blocks(model)[-1].router.parameters())).requires_grad_(True)
    if family in (*_NOT_KEPT, _NOISY):
        message = "hand on more than hidden states" if family != _NOISY else "has dropout or noise below layer"
        with (
            pytest.raises(PrefixCacheUnavailable, match=message),
            prefix_cache(source_of(model), SEQUENCES),
        ):
            pass
        return
    mask = batch["attention_mask"].bool()
    whole = model(**batch, use_cache=False)[0][mask]
    with prefix_cache(source_of(model), SEQUENCES) as cache, cache.serve(model):
        assert cache.layer_idx == layer_idx
        part = model(**batch, use_cache=False)[0][mask]
    assert (part - whole).std() < 1e-5 * whole.std()


@torch.no_grad()
@pytest.mark.parametrize(
    "other", [{"output_hidden_states": True}, {"position_ids": torch.arange(7)[None]}, {"output_router_logits": True}]
)
def test_other_inputs_and_unknown_sequences_run_the_whole_model(build, other) -> None:
    model = build.uoe(build.model()).eval()
    calls = count_calls(model, 0)
    with prefix_cache(source_of(model), SEQUENCES) as cache, cache.serve(model):
        calls.clear()
        model(**batch_of(SEQUENCES), use_cache=False)
        assert calls == []
        model(**batch_of(SEQUENCES), use_cache=False, **other)
        model(**batch_of([*SEQUENCES[:2], [5, 6, 7, 8, 10]]), use_cache=False)
        assert calls == [0, 0]


@torch.no_grad()
def test_left_padding_is_served(build) -> None:
    model = build.uoe(build.model()).eval()
    batch = collate([{"input_ids": ids} for ids in SEQUENCES], pad_token_id=0, padding_side="left")
    mask = batch["attention_mask"].bool()
    with prefix_cache(source_of(model), SEQUENCES) as cache:
        state = cache.state({name: batch[name] for name in ("input_ids", "attention_mask")})
    assert isinstance(state, torch.Tensor)
    right = cache.state(batch_of(SEQUENCES))
    assert torch.equal(state[mask], right[batch_of(SEQUENCES)["attention_mask"].bool()])


# ---- Training ----


def trained(make_trainer, build, **options: Any) -> tuple[Any, list[dict[str, float]], dict[str, torch.Tensor]]:
    losses, gradients = Losses(), build.keep_gradients()
    options = {"model": build.uoe(build.model()), "max_steps": -1, "num_train_epochs": 3, **options}
    trainer = make_trainer(callbacks=[losses, gradients], **options)
    trainer.train()
    return trainer, losses.seen, gradients.gradients


@pytest.mark.parametrize(
    ("forget_loss", "retain_loss"),
    [("npo", "nll"), ("grad_ascent", "kl"), ("rmu", "embed_diff"), ("npo", "relative_embed_diff"), ("dpo", "none")],
)
def test_losses_and_gradients_equal_those_of_the_whole_model(make_trainer, build, forget_loss, retain_loss) -> None:
    options = {"forget_loss": forget_loss, "retain_loss": retain_loss}
    if retain_loss == "none":
        options["retain"] = "none"
    _, expected, expected_gradients = trained(make_trainer, build, prefix_cache=False, **options)
    model = build.uoe(build.model())
    calls = count_calls(model, 0)
    _, found, gradients = trained(make_trainer, build, model=model, prefix_cache=True, **options)
    assert len(found) == len(expected) == 6
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=1e-3, abs=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-6)
    # The layer below runs for 8 + 11 (or 8 + 8) rows in batches of 4, and three times to check the first of them.
    assert len(calls) == 3 + (5 if retain_loss != "none" else 4)
    assert not any(module._forward_pre_hooks for module in (model, model.base_model))


def test_examples_of_equal_length_train_without_a_differing_bit(make_trainer, build) -> None:
    """Without padding, in one batch: the cache then holds what the whole model computes."""
    forget = Dataset.from_dict({"input_ids": [[5 + i, 9, 7, 8 + i] for i in range(4)]})
    retain = Dataset.from_dict({"input_ids": [[50 + i, 9, 7, 8 + i] for i in range(4)]})
    options = {"forget": forget, "retain": retain, "per_device_train_batch_size": 4}
    whole, expected, _ = trained(make_trainer, build, prefix_cache=False, **options)
    part, found, _ = trained(make_trainer, build, prefix_cache=True, **options)
    assert found == expected
    for (name, before), now in zip(whole.model.named_parameters(), part.model.parameters(), strict=True):
        assert torch.equal(now, before), name


def test_resuming_gives_the_same_bits(make_trainer, build, tmp_path) -> None:
    options = {"prefix_cache": True, "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / "run")}
    whole, expected, _ = trained(make_trainer, build, **options)
    losses = Losses()
    resumed = make_trainer(build.uoe(build.model()), max_steps=-1, num_train_epochs=3, callbacks=[losses], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert losses.seen == expected[3:]
    for now, before in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(now, before)


def test_evaluation_and_logged_routing_start_at_the_layer_and_say_the_same(make_trainer, build) -> None:
    eval_set = Dataset.from_dict({"prompt": ["what is new? "], "completion": ["nothing"]})
    options = {"eval_dataset": eval_set, "eval_strategy": "epoch", "log_routing": True, "logging_steps": 2}
    _, expected, _ = trained(make_trainer, build, prefix_cache=False, **options)
    model = build.uoe(build.model())
    calls = count_calls(model, 0)
    _, found, _ = trained(make_trainer, build, model=model, prefix_cache=True, **options)
    assert [logs.keys() for logs in found] == [logs.keys() for logs in expected]
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=1e-3, abs=1e-5)
    assert sum("eval_loss" in logs for logs in found) == sum("forget_selection_overlap" in logs for logs in found) == 3
    # As in the test above (one row more): overlaps are 1 in the layer below, where no one has to look.
    assert len(calls) == 3 + 5


def test_mixed_precision_trains_from_the_cache(make_trainer, build) -> None:
    _, expected, _ = trained(make_trainer, build, bf16=True, prefix_cache=False)
    model = build.uoe(build.model())
    calls = count_calls(model, 0)
    _, found, _ = trained(make_trainer, build, model=model, bf16=True, prefix_cache=True)
    assert len(calls) == 3 + 5
    for now, before in zip(found, expected, strict=True):
        assert now == pytest.approx(before, rel=3e-2)


def test_auto_uses_the_cache_where_examples_come_again(make_trainer, build, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="uoe_peft"):
        trained(make_trainer, build)
        assert "training starts at decoder layer 1" in caplog.text
        caplog.clear()
        trained(make_trainer, build, num_train_epochs=1)
        assert "no example comes up twice" in caplog.text
        assert "training starts at decoder layer" not in caplog.text


def test_auto_says_once_why_it_runs_the_whole_model(make_trainer, build, caplog) -> None:
    base = build.model()
    seen: dict[str, torch.Tensor] = {}
    base.model.layers[0].register_forward_pre_hook(lambda layer, args: seen.update(mean=args[0].mean()))
    base.model.layers[2].register_forward_hook(lambda layer, args, output: output + seen.pop("mean", 1.0))
    with caplog.at_level(logging.WARNING, logger="uoe_peft"):
        trained(make_trainer, build, model=build.uoe(base))
    assert caplog.text.count("gives other results when it starts at layer 1") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing": True, "anchor_weight": 0}, "reentrant"),
        ({"torch_compile": True}, "need every layer to run"),
        ({"neftune_noise_alpha": 5}, "adds other noise to the embeddings at every step"),
    ],
)
def test_settings_that_need_every_layer_are_refused(make_trainer, build, options, message) -> None:
    if "gradient_checkpointing" in options:
        options = {**options, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(PrefixCacheUnavailable, match=message):
        trained(make_trainer, build, prefix_cache=True, **options)


def test_gradient_checkpointing_gives_the_same_gradients(make_trainer, build) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    _, _, expected = trained(make_trainer, build, prefix_cache=False)
    _, _, gradients = trained(make_trainer, build, prefix_cache=True, **options)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_below_the_layer_is_refused(build, training) -> None:
    """Models are loaded in evaluation mode, and the Trainer changes that after the cache was made."""
    base = build.model()
    base.model.layers[0].mlp.register_forward_hook(
        lambda layer, args, output: nn.functional.dropout(output, 0.1, training=layer.training)
    )
    model = build.uoe(base).train(training)
    before = torch.get_rng_state()
    with (
        pytest.raises(PrefixCacheUnavailable, match="dropout or noise below layer 1"),
        prefix_cache(source_of(model), SEQUENCES),
    ):
        pass
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == training


def test_launchers_that_shard_without_the_arguments_are_seen(make_trainer, build, monkeypatch) -> None:
    trainer = make_trainer(build.uoe(build.model()), prefix_cache=True)
    trainer.is_fsdp_enabled = True
    with pytest.raises(PrefixCacheUnavailable, match="fsdp, deepspeed and torch_compile need every layer to run"):
        trainer.train()


def test_the_lowest_layer_is_where_an_adapter_or_a_trained_weight_is(build) -> None:
    assert lowest_edited_layer(build.uoe(build.model())) == 1
    assert lowest_edited_layer(build.uoe(build.model(), target_experts=[(2, 0), (1, 5)])) == 1
    model = build.uoe(build.model(), target_experts=[(2, 0)])
    assert lowest_edited_layer(model) == 2
    model.add_adapter("second", model.peft_config["default"].__class__(target_experts=[(1, 0)]))
    assert lowest_edited_layer(model) == 1
    with pytest.raises(NothingToCache, match=r"edited are \[0, 1, 2\] of 3"):
        lowest_edited_layer(build.lora(build.model()))
    with pytest.raises(NothingToCache, match=r"embed_tokens\.weight is trained"):
        lowest_edited_layer(build.model())


@pytest.mark.parametrize(("num_forget", "num_retain", "epochs"), [(4, 30, 2.5), (4, 5, 2), (3, 2, 1)])
def test_the_rows_of_training_are_cached_and_no_others(num_forget, num_retain, epochs) -> None:
    sets = [Dataset.from_dict({"input_ids": [[size, row] for row in range(size)]}) for size in (num_forget, num_retain)]
    dataset, expected = PairedDataset(*sets, seed=3), set()
    for epoch in range(math.ceil(epochs)):
        dataset.set_epoch(epoch)
        for row in (dataset[index] for index in range(num_forget)):
            expected |= {tuple(example["input_ids"]) for example in row.values()}
    assert {tuple(ids) for ids in rows_in_training(dataset, num_epochs=epochs)} == expected


# ---- Files ----


def write(directory: Path, key: str = "key", **options: Any) -> prefix_store.StateStore:
    sequences = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.arange(9.0).view(3, 3))]
    return write_store(directory, key, sequences, **{"num_tokens": 5, "row": torch.zeros(3), **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_as_they_were_written(tmp_path, dtype) -> None:
    write(tmp_path, row=torch.zeros(3, dtype=dtype))
    store = open_store(tmp_path, "key")
    assert store is not None and store.states("missing") is None
    assert torch.equal(store.states("b"), torch.arange(9, dtype=dtype).view(3, 3))
    assert torch.equal(store.states("a"), torch.arange(6, dtype=dtype).view(2, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "key.states"]
    assert (tmp_path / "key.states").stat().st_size == 15 * dtype.itemsize


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch) -> None:
    usage = prefix_store.shutil.disk_usage(tmp_path)._replace(free=60 + (64 << 20) - 1)
    monkeypatch.setattr(prefix_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PrefixCacheUnavailable, match=r"prefix cache needs 0 MB, and .* has 67 MB free"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_size_is_announced_before_writing(tmp_path, caplog) -> None:
    def sequences() -> Any:
        assert "writing 0.0 MB" in caplog.text
        yield "a", torch.zeros(2, 3)

    with caplog.at_level(logging.INFO, logger="uoe_peft"):
        write_store(tmp_path, "key", sequences(), num_tokens=2, row=torch.zeros(3))


def test_an_error_in_the_middle_leaves_nothing(tmp_path) -> None:
    def sequences() -> Any:
        yield "a", torch.zeros(2, 3)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        write_store(tmp_path, "key", sequences(), num_tokens=5, row=torch.zeros(3))
    with pytest.raises(ValueError, match="expected states of 7 tokens, got 5"):
        write(tmp_path, num_tokens=7)
    assert list(tmp_path.iterdir()) == []
    assert open_store(tmp_path, "key") is None


@pytest.mark.skipif(os.name != "posix", reason="processes are killed by a POSIX signal")
def test_what_a_killed_process_left_is_discarded(tmp_path) -> None:
    code = f"""
import os, signal, torch
from pathlib import Path
from uoe_peft.training.reuse.store import write_store
def sequences():
    yield "a", torch.zeros(2, 3)
    os.kill(os.getpid(), signal.SIGKILL)
write_store(Path({str(tmp_path)!r}), "key", sequences(), num_tokens=5, row=torch.zeros(3))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    assert open_store(tmp_path, "key") is None
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "key.states"]


@pytest.mark.parametrize("machine", ["this", "another"])
def test_the_file_of_a_running_process_stays(tmp_path, monkeypatch, machine) -> None:
    """Whether a process of another machine is running cannot be asked."""
    pid = os.getpid()
    if machine == "another":
        pid = 2**22 + 1  # higher than any that runs here
        monkeypatch.setattr(prefix_store.platform, "node", lambda: "another machine")
    monkeypatch.setattr(prefix_store.os, "getpid", lambda: pid)
    unfinished = prefix_store._unfinished_path(tmp_path, "other")
    monkeypatch.undo()
    unfinished.write_bytes(b"half")
    write(tmp_path)
    assert unfinished.exists()


def test_two_writers_with_one_process_number_do_not_write_into_one_file(tmp_path) -> None:
    """Containers count their processes by themselves."""
    states = torch.ones(2, 3)

    def sequences() -> Any:
        yield "a", states
        write_store(tmp_path, "key", iter([("a", states), ("b", states)]), num_tokens=4, row=states[0])
        yield "b", states

    store = write_store(tmp_path, "key", sequences(), num_tokens=4, row=states[0])
    assert all(torch.equal(cast(Tensor, store.states(name)), states) for name in ("a", "b"))


@pytest.mark.parametrize("damage", ["shorter states", "no states", "unreadable header", "other format"])
def test_a_damaged_cache_is_not_used(tmp_path, damage) -> None:
    write(tmp_path)
    states, header = tmp_path / "key.states", tmp_path / "key.json"
    match damage:
        case "shorter states":
            states.write_bytes(states.read_bytes()[:-1])
        case "no states":
            states.unlink()
        case "unreadable header":
            header.write_text("{", encoding="utf-8")
        case "other format":
            header.write_text(json.dumps(json.loads(header.read_text()) | {"format": 0}), encoding="utf-8")
    assert open_store(tmp_path, "key") is None


def test_the_key_changes_with_whatever_the_states_depend_on(build) -> None:
    def key(model: nn.Module, layer_idx: int = 2, digests: tuple[str, ...] = ("a", "b")) -> str:
        return cache_key(source_of(model), layer_idx, digests)

    reference = key(build.uoe(build.model()))
    assert key(build.uoe(build.model())) == reference
    assert key(build.uoe(build.model()), digests=("b", "a")) == reference
    changed = build.uoe(build.model())
    with torch.no_grad():
        changed.base_model.model.model.layers[2].mlp.experts.down_proj[0, 0, 0] += 1  # above: the states stay
        assert key(changed) == reference
        changed.base_model.model.model.layers[1].input_layernorm.weight[3] += 1e-6
    buffer = build.model()
    buffer.model.rotary_emb.inv_freq[0] *= 1.5
    attention, config = build.model(), build.model()
    attention.set_attn_implementation("eager")
    config.config.rms_norm_eps = 1e-5
    others = [key(changed), key(build.uoe(build.model()), layer_idx=1), key(build.uoe(build.model()), digests=("a",))]
    others += [key(build.uoe(m)) for m in (buffer, attention, config, build.model().to(torch.bfloat16))]
    assert len({reference, *others}) == 8


def test_a_kept_cache_is_found_again_and_a_stale_one_is_not(build, tmp_path) -> None:
    model = build.uoe(build.model()).eval()
    calls = count_calls(model, 0)
    with prefix_cache(source_of(model), SEQUENCES, folder=StateFolder(tmp_path)):
        computed = len(calls)
    calls.clear()
    with prefix_cache(source_of(model), SEQUENCES, folder=StateFolder(tmp_path)) as cache:
        assert len(calls) == computed - 2  # 4 sequences in batches of 3; checking the first batch stays
        first = cache.store.values.clone()
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.weight.mul_(1.5)
    with prefix_cache(source_of(model), SEQUENCES, folder=StateFolder(tmp_path)) as cache:
        assert not torch.equal(cache.store.values, first)
    assert len(list(tmp_path.glob("*.states"))) == 2


def test_a_temporary_cache_is_removed_even_after_an_error(build, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="stop"), prefix_cache(source_of(build.uoe(build.model())), SEQUENCES):
        assert len(list(tmp_path.glob("*/states.states"))) == 1
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_the_option_can_be_given_on_a_command_line() -> None:
    from transformers import HfArgumentParser

    from uoe_peft.training import UnlearningConfig

    parser = HfArgumentParser(UnlearningConfig)
    common = ["--output_dir", "out", "--use_cpu", "True"]
    for text, value in (("auto", "auto"), ("True", True), ("False", False)):
        (args,) = parser.parse_args_into_dataclasses([*common, "--prefix_cache", text])
        assert args.prefix_cache == value
    with pytest.raises(ValueError, match="prefix_cache must be one of"):
        UnlearningConfig(output_dir="out", use_cpu=True, prefix_cache="yes")
