"""A later request that leaves earlier ones withdrawable: whose facts, under which adapters, with which weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn import functional

from tests.training.conftest import KeepGradients, make_args, make_model, make_sets, make_tokenizer, with_lora
from tests.tuner.conftest import randomise
from uoe_peft.requests import RequestTrainer, add_request, withdrawn
from uoe_peft.training import UnlearningTrainer
from uoe_peft.tuner import UOEConfig

IDS = torch.arange(3, 15).view(2, 6)
TOKENIZER = make_tokenizer()
NEW = UOEConfig(target_experts=[(1, 4)])


def three_requests() -> Any:
    """Two earlier requests, of different layers, and a new one."""
    model: Any = make_model()
    for seed, (name, pair) in enumerate({"first": (2, 1), "second": (1, 2)}.items()):
        model = add_request(model, UOEConfig(target_experts=[pair]), name)
        randomise(model, adapter_name=name, std=0.05, seed=seed)
    return add_request(model, NEW, "new")


def facts(*names: str) -> Dataset:
    return Dataset.from_dict({"prompt": [f"who is {n}? " for n in names], "completion": [n * 3 for n in names]})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def trained(trainer_class: Any, tmp_path: Path, options: dict[str, Any], **more: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer after one step, and the gradients of that step."""
    forget, retain = make_sets()
    seen = KeepGradients()
    chosen = {"max_steps": 1, "calibrate": False, "forget_loss": "grad_ascent", "retain_weight": 3.0, **options}
    trainer = trainer_class(
        model=three_requests(),
        args=make_args(output_dir=str(tmp_path), max_grad_norm=0.0, **chosen),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=TOKENIZER,
        callbacks=[seen],
        **more,
    )
    trainer.train()
    return trainer, seen.gradients


def test_off_inside_and_as_it_was_outside() -> None:
    model = three_requests()
    randomise(model, adapter_name="new", std=0.05, seed=2)
    on = logits(model)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    for name in ("first", "second"):
        with withdrawn(model, name):
            found = logits(model)
            assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
        other = three_requests()
        randomise(other, adapter_name="new", std=0.05, seed=2)
        other.base_model.set_strength(0.0, name)
        torch.testing.assert_close(found, logits(other))
        assert not torch.allclose(found, on, atol=1e-4)
        assert torch.equal(logits(model), on) and model.active_adapters == ["first", "second", "new"]
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trains


def test_a_model_with_one_request_is_the_base_inside() -> None:
    base = make_model()
    plain = logits(base)
    model = add_request(base, NEW, "new")
    randomise(model, adapter_name="new")
    with pytest.raises(KeyError, match="stop"), withdrawn(model, "new"):
        assert torch.equal(logits(model), plain)
        raise KeyError("stop")
    assert not torch.allclose(logits(model), plain, atol=1e-4)
    with pytest.raises(ValueError, match="'other' is not active"), withdrawn(model, "other"):
        pass


@pytest.mark.parametrize(
    ("cached", "accumulation", "weight"), [(False, 1, None), ("auto", 1, None), (False, 2, None), ("auto", 1, 0.5)]
)
def test_a_step_adds_the_facts_of_one_request_with_its_adapter_off(
    tmp_path: Path, cached: Any, accumulation: int, weight: float | None
) -> None:
    known = facts("H", "I", "J", "K")  # as many as a batch has rows, so that all are drawn in each micro-batch
    options = {"prefix_cache": cached, "gradient_accumulation_steps": accumulation}
    _, plain = trained(UnlearningTrainer, tmp_path, options)
    trainer, both = trained(RequestTrainer, tmp_path, options, earlier={"second": known}, earlier_weight=weight)
    own = {name: p for name, p in three_requests().named_parameters() if ".new." in name}
    assert set(both) == set(plain) == set(own)

    model = three_requests()
    model.base_model.set_strength(0.0, "second")
    ids = [TOKENIZER(p + c)["input_ids"] + [1] for p, c in zip(known["prompt"], known["completion"], strict=True)]
    starts = [len(p) for p in known["prompt"]]
    batch = torch.tensor(ids)
    log_probs = functional.log_softmax(model.train(False)(batch).logits[:, :-1].float(), dim=-1)
    taken = log_probs.gather(-1, batch[:, 1:, None])[..., 0]
    loss = -torch.cat([row[start - 1 :] for row, start in zip(taken, starts, strict=True)]).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in own:
            torch.testing.assert_close(both[name] - plain[name], (weight or 3.0) * parameter.grad, rtol=1e-3, atol=1e-6)
    assert trainer.state.log_history[0]["withdrawn_nll"] == pytest.approx(loss.item(), rel=1e-3)


def test_requests_take_turns_and_rows_change(tmp_path: Path) -> None:
    trainer, _ = trained(RequestTrainer, tmp_path, {}, earlier={"first": facts(*"HIJKLMNO"), "second": facts("P", "Q")})
    drawn = []
    for step in (4, 5, 6, 7):
        trainer.state.global_step = step
        drawn.append(trainer._draw(4))
    assert [name for name, _ in drawn] == ["first", "second", "first", "second"]
    assert [len(batch["input_ids"]) for _, batch in drawn] == [4, 2, 4, 2]
    assert not torch.equal(drawn[0][1]["input_ids"], drawn[2][1]["input_ids"])
    trainer.state.global_step = 4
    first, again = trainer._draw(4), trainer._draw(4)  # two micro-batches of a step
    assert torch.equal(first[1]["input_ids"], drawn[0][1]["input_ids"])
    assert again[0] == "second"


def test_the_earlier_adapters_are_what_they_were_and_are_on_again(tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in three_requests().named_parameters()}
    trainer, _ = trained(
        RequestTrainer, tmp_path, {"max_steps": 3}, earlier={"first": facts("H"), "second": facts("I")}
    )
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".new." in name for name in changed)
    assert trainer.model.active_adapters == ["first", "second", "new"]


@pytest.mark.parametrize(
    ("earlier", "options", "error", "message"),
    [
        (("new",), {}, ValueError, r"\['new'\] are trained"),
        (("third",), {}, ValueError, r"\['third'\] have no active adapter"),
        (("first",), {"gradient_checkpointing": True}, ValueError, "gradient_checkpointing"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, earlier: tuple[str, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trained(RequestTrainer, tmp_path, options, earlier={name: facts("H") for name in earlier})


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_from_zero_on(tmp_path: Path, weight: float) -> None:
    with pytest.raises(ValueError, match="earlier_weight must be >= 0"):
        trained(RequestTrainer, tmp_path, {}, earlier={"first": facts("H")}, earlier_weight=weight)


def test_other_models_have_no_requests_to_withdraw() -> None:
    forget, retain = make_sets()
    sets: dict[str, Any] = {"train_dataset": forget, "retain_dataset": retain, "processing_class": TOKENIZER}
    with pytest.raises(TypeError, match="earlier requests, got Qwen2MoeForCausalLM"):
        RequestTrainer(make_model(), make_args(), earlier={"first": forget}, **sets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are trained"):
        RequestTrainer(with_lora(make_model()), make_args(), earlier={"default": forget}, **sets)
    with pytest.raises(ValueError, match="empty"):
        RequestTrainer(three_requests(), make_args(), earlier={"first": forget.select([])}, **sets)
