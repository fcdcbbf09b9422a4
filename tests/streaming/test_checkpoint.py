"""What is wrong with a checkpoint is said when it is opened, by the name of the file or tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.streaming.conftest import Open
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.passes import run_passes
from uoe_peft.streaming import StreamedModel, residence
from uoe_peft.streaming import model as streamed_model
from uoe_peft.streaming.checkpoint import Checkpoint
from uoe_peft.streaming.memory import available_memory

INDEX = "model.safetensors.index.json"


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def rewrite_index(checkpoint: Path, change: Any) -> None:
    content = json.loads((checkpoint / INDEX).read_text())
    change(content["weight_map"])
    (checkpoint / INDEX).write_text(json.dumps(content))


def test_headers_name_every_tensor_and_its_shard(checkpoint: Path) -> None:
    found = Checkpoint.open(checkpoint).tensors
    for path in shards(checkpoint):
        for name, tensor in load_file(path).items():
            assert (found[name].shard, found[name].dtype, found[name].shape) == (path.name, tensor.dtype, tensor.shape)
            assert found[name].num_bytes == tensor.numel() * tensor.element_size()


def test_a_missing_shard(checkpoint: Path, opened: Open) -> None:
    shards(checkpoint)[1].unlink()
    with pytest.raises(ValueError, match=r"has no model-00002-of-.*, which its model.safetensors.index.json names"):
        opened()


def test_a_shard_that_was_cut_off(checkpoint: Path, opened: Open) -> None:
    path = shards(checkpoint)[2]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{path.name} is not a whole safetensors file .*cut off"):
        opened()


def test_an_index_that_names_absent_tensors(checkpoint: Path, opened: Open) -> None:
    rewrite_index(checkpoint, lambda names: names.update({"model.layers.1.extra": shards(checkpoint)[0].name}))
    with pytest.raises(ValueError, match=r"says that model-00001-.* holds model.layers.1.extra, which it does not"):
        opened()


def test_a_checkpoint_that_lacks_a_tensor(checkpoint: Path, opened: Open) -> None:
    name = "model.layers.2.mlp.gate.weight"
    path = next(path for path in shards(checkpoint) if name in load_file(path))
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)
    rewrite_index(checkpoint, lambda names: names.pop(name))
    with pytest.raises(ValueError, match=f"has no {name} .* not a whole checkpoint of a Qwen2MoeForCausalLM"):
        opened()


def test_a_tensor_of_another_shape(checkpoint: Path, opened: Open) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    path = next(path for path in shards(checkpoint) if name in load_file(path))
    save_file({**load_file(path), name: torch.zeros(3, 5)}, path)
    with pytest.raises(ValueError, match=r"has another shape of .*layers.2.self_attn.q_proj.weight"):
        opened()


def test_an_index_that_cannot_be_read(checkpoint: Path, opened: Open) -> None:
    (checkpoint / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        opened()


def test_shards_without_an_index_and_a_folder_without_weights(checkpoint: Path, opened: Open) -> None:
    (checkpoint / INDEX).unlink()
    with pytest.raises(ValueError, match=r"has the shards .* but no model.safetensors.index.json"):
        opened()
    for path in shards(checkpoint):
        path.unlink()
    with pytest.raises(ValueError, match=r"expected a checkpoint in safetensors format"):
        opened()


def test_dense_models(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_hidden_layers=2, vocab_size=20)).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match=r"no Mixture-of-Experts block"):
        StreamedModel.from_pretrained(tmp_path / "dense")


def test_an_unknown_dtype(opened: Open) -> None:
    with pytest.raises(ValueError, match=r"dtype must be 'auto', .* got 'float23'"):
        opened(dtype="float23")


def test_too_little_memory_for_a_layer(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_model, "available_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"a layer of .* takes .* GiB to bring in \(.*\), more than .* are free"):
        opened()


def test_too_little_memory_for_a_batch(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    layer = sum(parameter.numel() * 4 for parameter in model.model.layers[1].parameters())
    monkeypatch.setattr(streamed_model, "available_memory", lambda: 3 * layer)
    ran: list[int] = []

    def passes(num_tokens: int) -> list[Any]:
        def run() -> None:
            with torch.no_grad():
                model(input_ids=torch.ones(1, num_tokens, dtype=torch.long), use_cache=False)
            ran.append(num_tokens)

        return [run]

    list(run_passes(model, passes(3)))
    with pytest.raises(ValueError, match=r"a batch of 900 tokens about .* use a smaller batch_size or max_length"):
        list(run_passes(model, passes(900)))
    assert ran == [3]


def test_layers_that_cannot_all_stay(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened()
    monkeypatch.setattr(residence, "available_memory", lambda: 100_000)
    for ask in (model.check_layers, model.keep_layers):
        with pytest.raises(
            ValueError, match=r"layers \[0, 1, 2\] .* use forget_loss='rmu' with retain_loss='embed_diff'"
        ):
            ask([0, 1, 2])
        with pytest.raises(ValueError, match=r"the model has 3 decoder layers, got layer 3"):
            ask([3])
    model.check_layers([1])
    assert model.model.layers[1].input_layernorm.weight.is_meta  # asked, not brought in


def test_memory_is_what_the_system_and_the_container_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   3000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000",
        "/sys/fs/cgroup/memory.current": "4000000",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: told[str(self)])
    assert available_memory() == 1_000_000
    told["/sys/fs/cgroup/memory.max"] = "max"
    assert available_memory() == 3000 * 1024


def test_a_shard_that_is_written_anew_while_it_is_streamed(checkpoint: Path, opened: Open) -> None:
    model = opened()
    model.keep_layers([0])
    found = shards(checkpoint)
    for change in (lambda path: path.write_bytes(path.read_bytes()[:-10]), Path.unlink):
        for path in found:
            change(path)
        with pytest.raises(ValueError, match=r"is not the file that it was when the checkpoint was opened"):
            model.keep_layers([2])


def test_a_shard_of_the_same_size_that_is_written_anew(checkpoint: Path, opened: Open) -> None:
    model = opened()
    for path in shards(checkpoint):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
        os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"is not the file that it was when the checkpoint was opened"):
        model.keep_layers([2])
