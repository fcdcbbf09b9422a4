"""Moments beside an adapter: what they are, where they lie, what the card says, what later requests do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional

from tests.training.conftest import make_args, make_model, make_sets, make_tokenizer, with_lora
from tests.tuner.conftest import randomise
from uoe_peft.moments import Moments, SliceMoments, SliceName
from uoe_peft.requests import (
    RequestTrainer,
    add_regression_mean,
    add_request,
    load_forget_moments,
    save_forget_moments,
)
from uoe_peft.requests.stored_moments import with_requests
from uoe_peft.tuner import UOEConfig

FILE = "forget_moments.safetensors"
TOKENIZER = make_tokenizer()
ROUTER = SliceName(1, None, "router")
pytestmark = pytest.mark.filterwarnings("ignore:fewer tokens of the")


def trainer_of(model: Any, tmp_path: Path, *, more: dict[str, Any], **options: Any) -> RequestTrainer:
    forget, retain = make_sets()
    return RequestTrainer(
        model,
        make_args(output_dir=str(tmp_path), **{"calibrate": False, **options}),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=TOKENIZER,
        **more,
    )


@torch.no_grad()
def seconds(model: Any, expert_idx: int) -> dict[str, torch.Tensor]:
    """`C` over the forget set of layer 1's router and of what an expert's down projection reads, by hand."""
    forget, _ = make_sets()
    inputs: list[torch.Tensor] = []
    block = model.get_submodule("model.layers.1.mlp")
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    for prompt, completion in zip(forget["prompt"], forget["completion"], strict=True):
        model.eval()(torch.tensor([[*TOKENIZER(prompt + completion)["input_ids"], 1]]))
    handle.remove()
    rows = torch.cat(inputs)
    weights, chosen = functional.softmax(rows @ block.gate.weight.T, dim=-1).topk(3, dim=-1)
    gate, up = (rows @ block.experts.gate_up_proj[expert_idx].T).chunk(2, dim=-1)
    own = (weights * (chosen == expert_idx)).sum(dim=-1)
    hidden = (functional.silu(gate) * up * own[:, None])[own > 0]
    return {"router": rows.T @ rows / len(rows), "down_proj": hidden.T @ hidden / len(hidden)}


def test_they_are_of_the_model_without_the_adapter_and_lie_beside_it(tmp_path: Path) -> None:
    model = add_request(make_model(), UOEConfig(target_experts=[(0, 1)]), "first")
    randomise(model, adapter_name="first", std=0.05)
    expected = seconds(model.get_base_model(), 2)  # the first request is forgotten in it
    model = add_request(model, UOEConfig(target_experts=[(1, 2)]), "second")
    randomise(model, adapter_name="second", std=0.05, seed=1)
    trainer = trainer_of(model, tmp_path, more={"keep_moments": True}, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "first" / FILE).exists()
    found = load_forget_moments(tmp_path / "saved" / "second")
    assert {(name.layer_idx, name.expert_idx) for name in found.slices} == {(1, None), (1, 2)}
    for name, own in found.slices.items():
        if name.projection in expected:
            torch.testing.assert_close(own.second, expected.pop(name.projection), rtol=1e-3, atol=1e-5)
    assert not expected
    size = (tmp_path / "saved" / "second" / FILE).stat().st_size
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"`{FILE}` ({size / 1000:.0f} kB)" in card and "treat it like the set" in card
    assert load_forget_moments(found) is found


def test_without_the_option_nothing_is_measured_or_said(tmp_path: Path) -> None:
    model = add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "default")
    trainer = trainer_of(model, tmp_path, more={}, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not list(tmp_path.rglob(FILE)) and "Moments" not in (tmp_path / "saved" / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="saved without its forget set's moments"):
        load_forget_moments(tmp_path / "saved")


def test_the_card_counts_the_adapters_own_file_and_not_those_of_checkpoints(tmp_path: Path) -> None:
    model = add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "default")
    trainer = trainer_of(model, tmp_path, more={"keep_moments": True}, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / FILE).is_file()
    trainer.save_model(str(tmp_path))
    assert f"({(tmp_path / FILE).stat().st_size / 1000:.0f} kB)" in (tmp_path / "README.md").read_text()


def slice_of(rows: torch.Tensor) -> SliceMoments:
    rows = rows.double()
    return SliceMoments(rows.mean(dim=0).float(), (rows.T @ rows / len(rows)).float(), len(rows))


def test_together_they_are_moments_over_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 5, generator=generator) + n for n in (7, 4, 12)]
    retain, *requests = (Moments({ROUTER: slice_of(rows)}, 2 * len(rows)) for rows in parts)
    found = with_requests(retain, dict(enumerate(requests)))  # type: ignore[arg-type]
    expected = slice_of(torch.cat(parts))
    torch.testing.assert_close(found.slices[ROUTER].second, expected.second)
    torch.testing.assert_close(found.slices[ROUTER].mean, expected.mean)
    assert found.slices[ROUTER].num_tokens == 23 and found.num_tokens == 46
    assert with_requests(retain, {}).slices[ROUTER].num_tokens == 7
    narrow = Moments({ROUTER: slice_of(torch.ones(3, 4))}, 3)
    with pytest.raises(ValueError, match="of 'old' have width 4 in layer 1, router, the model's 5"):
        with_requests(retain, {"old": narrow})
    other = Moments({SliceName(1, 3, "down_proj"): slice_of(torch.ones(3, 5))}, 3)
    with pytest.raises(ValueError, match=r"of 'old' lack layer 1, router.*experts \[\(1, 3\)\]"):
        with_requests(retain, {"old": other})


def change_of(model: Any, moments: Moments, tmp_path: Path, *, with_moments: bool) -> float:
    """How much training changes what an earlier request's tokens get from the router, as `tr(Δ C Δᵀ)`."""
    more: dict[str, Any] = {"earlier_moments": {"old": moments}} if with_moments else {}
    trainer_of(model, tmp_path, more=more, max_steps=4, retain_projection=1e-3, learning_rate=1e-2).train()
    router = model.get_submodule("base_model.model.model.layers.1.mlp.gate")
    (key,) = router.edited_keys(["new"])
    delta = router.get_delta_weight("new", *key).detach().double()
    return float((delta @ moments.slices[ROUTER].second.double() @ delta.T).trace() / delta.square().sum())


def test_a_later_request_stays_out_of_an_earlier_ones_directions(tmp_path: Path) -> None:
    config = UOEConfig(target_experts=[(1, 2)])
    probe = trainer_of(add_request(make_model(), config, "new"), tmp_path, more={}, retain_projection=1.0)
    direction = torch.zeros(32)
    direction[5] = 3.0
    slices = {
        name: slice_of(torch.randn(40, own.dimension, generator=torch.Generator().manual_seed(1)) * 1e-3)
        if name != ROUTER
        else slice_of(direction.repeat(4000, 1))
        for name, own in probe._measure("retain").slices.items()
    }
    moments = Moments(slices, 4000)
    plain = change_of(add_request(make_model(), config, "new"), moments, tmp_path, with_moments=False)
    kept = change_of(add_request(make_model(), config, "new"), moments, tmp_path, with_moments=True)
    assert plain > 1e-3 and kept < 0.01 * plain


def test_regression_reads_the_folders(tmp_path: Path) -> None:
    model = add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "a")
    trainer = trainer_of(model, tmp_path, more={"keep_moments": True}, max_steps=1)
    trainer.train()
    randomise(model, adapter_name="a", std=0.05)
    trainer.save_model(str(tmp_path))
    add_regression_mean(model, ["a"], {"a": tmp_path / "a"}, "mean", ridge=1e-6)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.gate")
    second = load_forget_moments(tmp_path / "a").slices[ROUTER].second.double()
    (key,) = layer.edited_keys(["a"])
    own = layer.get_delta_weight("a", *key).detach().double()
    damping = 1e-6 * second.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    expected = own @ second @ torch.linalg.inv(second + damping)
    torch.testing.assert_close(layer.get_delta_weight("mean", *key).double(), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="saved without its forget set's moments"):
        add_regression_mean(model, ["a"], {"a": tmp_path}, "again")
    assert "again" not in model.peft_config


def test_saving_by_hand_rewrites_the_card(tmp_path: Path) -> None:
    model: PeftModel = add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "default")
    moments = Moments({ROUTER: slice_of(torch.ones(3, 5))}, 3)
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        save_forget_moments(tmp_path, moments)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert "Moments" not in (tmp_path / "README.md").read_text()
    path = save_forget_moments(tmp_path, moments)
    assert path == tmp_path / FILE and "## Moments" in (tmp_path / "README.md").read_text()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="no readable safetensors"):
        load_forget_moments(tmp_path)


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        ({"earlier_moments": {"old": Moments({}, 1)}}, {}, "set retain_projection"),
        ({"keep_moments": True, "model": "lora"}, {}, "one UOE adapter in training"),
    ],
)
def test_bad_input_is_named(more: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    kind = more.pop("model", "uoe")
    model = (
        with_lora(make_model())
        if kind == "lora"
        else add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "new")
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path, more=more, **options)


def test_moments_of_other_experts_are_refused_when_training_begins(tmp_path: Path) -> None:
    model = add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "new")
    more = {"earlier_moments": {"old": Moments({}, 1)}}
    trainer = trainer_of(model, tmp_path, more=more, retain_projection=1.0)
    with pytest.raises(ValueError, match="the moments of 'old' lack"):
        trainer.train()
