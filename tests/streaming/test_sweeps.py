"""Layer by layer: what is in memory, what is read and how often, and how a run goes on that was stopped."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.streaming.conftest import Open
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.passes import run_passes
from uoe_peft.moe.routing import record_routing
from uoe_peft.streaming import StreamedModel, residence
from uoe_peft.streaming.reader import PartReader
from uoe_peft.streaming.states import States


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 97, (2, 5 + index), generator=generator) for index in range(count)]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def swept(model: Any, ids: list[Tensor]) -> list[Tensor]:
    return [output for output, _ in run_passes(model, [partial(logits, model, batch) for batch in ids])]


def on_disk(model: Any) -> list[bool]:
    return [layer.mlp.experts.gate_up_proj.is_meta for layer in model.model.layers]


def test_many_passes_read_each_layer_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = opened(), []
    whole = PartReader.read

    def counted(self: PartReader, belongs: Any) -> dict[str, Tensor]:
        found = whole(self, belongs)
        reads.append(sorted({name.split(".")[2] for name in found if ".layers." in name}) or sorted(found))
        return found

    monkeypatch.setattr(PartReader, "read", counted)
    swept(model, batches())
    assert reads == [["model.embed_tokens.weight"], ["0"], ["1"], ["2"], ["lm_head.weight"]]


def test_no_more_than_one_layer_is_in_memory(opened: Open) -> None:
    model, seen = opened(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: seen.append(on_disk(model).count(False)))
    swept(model, batches())
    logits(model, batches()[0])
    assert set(seen) == {1}
    assert all(on_disk(model))
    assert not model.lm_head.weight.is_meta  # a single call ends with it; many passes leave nothing
    swept(model, batches(1))
    assert model.lm_head.weight.is_meta


def test_without_room_nothing_is_read_ahead(opened: Open, resident: PreTrainedModel, monkeypatch: Any) -> None:
    model, ahead = opened(), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ahead.append((index, model._residence._ahead is not None)))
    expected = [logits(resident, batch) for batch in batches(1)]
    for free, reads_ahead in ((None, True), (1000, False)):
        ahead.clear()
        monkeypatch.setattr(residence, "available_memory", lambda free=free: free)
        assert all(map(torch.equal, swept(model, batches(1)), expected))
        assert ahead == [(0, reads_ahead), (1, reads_ahead), (2, False)]


def test_kept_layers_stay(opened: Open, resident: PreTrainedModel) -> None:
    model = opened()
    model.keep_layers([1])
    weight = model.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(weight, resident.model.layers[1].mlp.experts.gate_up_proj)
    swept(model, batches())
    assert model.model.layers[1].mlp.experts.gate_up_proj is weight


def test_weights_stored_narrow_are_computed_wide(checkpoint: Path, opened: Open, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16").save_pretrained(tmp_path / "narrow")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype="float32")
    model = StreamedModel.from_pretrained(tmp_path / "narrow", dtype="float32", show_progress=False)
    assert all(map(torch.equal, swept(model, batches()), [logits(wide, batch) for batch in batches()]))
    assert StreamedModel.from_pretrained(tmp_path / "narrow", dtype="auto").dtype == torch.bfloat16


def test_states_beyond_the_limit_go_to_files(opened: Open, resident: PreTrainedModel, monkeypatch: Any) -> None:
    written = []
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda value, path: (written.append(path), save(value, path)))
    found = swept(opened(state_memory=2500), batches())
    assert all(map(torch.equal, found, [logits(resident, batch) for batch in batches()]))
    assert written
    assert not any(Path(path).exists() for path in written)


def test_a_disk_without_room_is_said_at_the_start(opened: Open, tmp_path: Path, monkeypatch: Any) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"hidden states take .* GiB left; pass fewer tokens"):
        swept(opened(state_dir=tmp_path / "states"), batches())


@pytest.mark.parametrize("killed_in", [0, 1, 2])
def test_a_run_that_was_killed_goes_on(killed_in: int, opened: Open, resident: PreTrainedModel, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def run(model: Any, *, kill: bool) -> list[list[Tensor]]:
        with record_routing(model) as trace:

            def read(position: int, layer_idx: int) -> Tensor:
                calls.append((layer_idx, position))
                if kill and (layer_idx, position) == (killed_in, 2):
                    raise KeyboardInterrupt
                return trace[layer_idx].scores.clone()

            passes = [partial(logits, model, batch) for batch in batches()]
            return [[out, *read] for out, read in run_passes(model, passes, layer_indices=[0, 1, 2], read=read)]

    expected = run(resident, kill=False)
    with pytest.raises(KeyboardInterrupt):
        run(opened(state_dir=tmp_path / "states"), kill=True)
    (tmp_path / "states" / "mine.txt").write_text("a file of the user")
    calls.clear()
    found = run(opened(state_dir=tmp_path / "states"), kill=False)
    assert {layer_idx for layer_idx, _ in calls} == set(range(killed_in, 3))
    assert all(torch.equal(*pair) for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True))
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["mine.txt"]


def test_states_of_other_inputs_are_not_taken(opened: Open, resident: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "states"
    states = States(limit=0, folder=folder, key="another run")
    states.begin(1)
    states.put(0, torch.zeros(2, 5, 32))
    states.finish(1, {})
    (found,) = swept(opened(state_dir=folder), batches(1))
    assert torch.equal(found, logits(resident, batches()[0]))


def test_inputs_without_token_ids_are_refused(opened: Open) -> None:
    model = opened()
    with pytest.raises(UnsupportedModelError, match="never called its Embedding; pass token ids"):
        list(run_passes(model, [lambda: model(inputs_embeds=torch.zeros(1, 3, 32))]))


def test_errors_of_a_pass_are_the_callers(opened: Open, resident: PreTrainedModel) -> None:
    model = opened()

    def fails() -> None:
        logits(model, batches()[0])
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        list(run_passes(model, [fails]))
    (found,) = swept(model, batches(1))  # nothing is left behind
    assert torch.equal(found, logits(resident, batches()[0]))


def test_no_passes(opened: Open) -> None:
    assert list(run_passes(opened(), [])) == []


def stopped(model: Any, ids: list[Tensor]) -> None:
    """Passes that end in the middle of the last layer."""
    calls = []

    def stop(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        swept(model, ids)
    handle.remove()


def test_states_of_a_checkpoint_that_was_changed_since_are_not_taken(
    checkpoint: Path, opened: Open, tmp_path: Path
) -> None:
    stopped(opened(state_dir=tmp_path / "states"), batches())
    for path in checkpoint.glob("*.safetensors"):
        save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    changed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    found = swept(opened(state_dir=tmp_path / "states"), batches())
    assert all(map(torch.equal, found, [logits(changed, batch) for batch in batches()]))


@pytest.mark.parametrize("setting", [("num_experts_per_tok", 1), ("rms_norm_eps", 0.5)])
def test_states_of_another_configuration_are_not_taken(
    setting: tuple[str, float], checkpoint: Path, opened: Open, tmp_path: Path
) -> None:
    stopped(opened(state_dir=tmp_path / "states"), batches())
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, setting[0]: setting[1]}))
    changed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    found = swept(opened(state_dir=tmp_path / "states"), batches())
    assert all(map(torch.equal, found, [logits(changed, batch) for batch in batches()]))


def test_a_state_that_has_gone_or_is_cut_off_is_named(opened: Open, tmp_path: Path) -> None:
    stopped(opened(state_dir=tmp_path / "states"), batches())
    last = tmp_path / "states" / "layer-1" / "3.pt"
    for change in (lambda: last.write_bytes(last.read_bytes()[:-50]), lambda: last.write_bytes(b""), last.unlink):
        change()
        with pytest.raises(ValueError, match=r"layer-1/3.pt cannot be read .* remove its state_dir to begin anew"):
            swept(opened(state_dir=tmp_path / "states"), batches())


def test_a_folder_that_cannot_be_written_is_said_when_the_model_is_opened(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "states"):
        with pytest.raises(ValueError, match=r"state_dir .*file.* cannot be written .* name another folder, or none"):
            opened(state_dir=folder)

    def read_only(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied"):
        opened(state_dir=tmp_path)


def test_a_layer_that_came_in_by_half_is_none(
    opened: Open, resident: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, put, calls = opened(), residence._Slot.put, []

    def fails_once(self: Any, value: Tensor) -> None:
        calls.append(self.name)
        if len(calls) == 4:
            raise MemoryError
        put(self, value)

    monkeypatch.setattr(residence._Slot, "put", fails_once)
    with pytest.raises(MemoryError):
        model.keep_layers([1])
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    model.keep_layers([1])
    expected = dict(resident.model.layers[1].named_parameters())
    for name, parameter in model.model.layers[1].named_parameters():
        assert torch.equal(parameter, expected[name])
