"""Training under a projection, against a model whose forward pass multiplies D and P, trained with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from tests.families import build as build_family
from uoe_peft.moments import measure_moments
from uoe_peft.training import UnlearningTrainer
from uoe_peft.training.optim.projection import (
    MOMENTS_FILE,
    TRAINED_FILE,
    RetainProjection,
    edited_parameters,
    moments_of_edits,
)
from uoe_peft.tuner import UOEConfig

RHO = 0.3
RATE, WEIGHT_DECAY = 1e-2, 0.1


def projections(model: PeftModel, retain: Dataset, tokenizer: Any) -> dict[str, Tensor]:
    """P of each trained matrix by the name of its parameter: from tokens that are fed one by one, by eigenvectors."""
    layer = model.get_base_model().model.layers[1].mlp
    experts, router = layer.experts.base_layer, layer.gate
    rows: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": [], "router": []}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, index, weights = args
        for t, k in zip(*torch.where(index == 2), strict=True):
            weighted = weights[t, k] * hidden[t]
            gate, up = (experts.gate_up_proj[2] @ hidden[t]).chunk(2)
            rows["gate_up_proj"].append(weighted)
            rows["down_proj"].append(weights[t, k] * nn.functional.silu(gate) * up)
        rows["router"].extend(hidden)

    handle = experts.register_forward_pre_hook(watch)
    with torch.no_grad():
        for row in retain:
            ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
            model(input_ids=torch.tensor([ids]))
    handle.remove()
    found = {}
    for name, seen in rows.items():
        matrix = torch.stack(seen).double()
        values, vectors = torch.linalg.eigh(matrix.T @ matrix / len(matrix))
        damping = 1 / (1 + values / (RHO * values.mean()))
        found[name] = ((vectors * damping) @ vectors.T).float()
    assert router is not None
    return found


class Record(TrainerCallback):
    """Gradients of Δ cannot be read in training, D's are; so the losses' inputs are replayed by the test."""

    def __init__(self) -> None:
        self.deltas: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.deltas.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


def short(name: str) -> str:
    return "router" if ".gate." in name else name.rsplit(".", 1)[1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_that_of_d(
    make_trainer: Callable[..., UnlearningTrainer], build: Any, tokenizer: Any, sets: Any, accumulation: int
) -> None:
    """AdamW with decay and clipping, by hand: D is the parameter, the model holds D P, autograd goes through P."""
    record = Record()
    options = {
        "forget_loss": "grad_ascent",
        "retain_loss": "none",
        "anchor_weight": 0.0,
        "max_steps": 3,
        "learning_rate": RATE,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.05,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = make_trainer(retain_projection=RHO, callbacks=[record], **options)
    trainer.train()

    model = build.uoe(build.model())
    matrices = projections(model, sets[1], tokenizer)
    deltas = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = {name: nn.Parameter(torch.zeros_like(p)) for name, p in deltas.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=WEIGHT_DECAY)
    for step in range(3):
        held = {name: d @ matrices[short(name)] for name, d in trained.items()}
        loss = -mean_nll(model, held, sets[0], tokenizer)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 0.05)
        optimiser.step()
        for name, d in trained.items():
            expected = d.detach() @ matrices[short(name)]
            torch.testing.assert_close(record.deltas[step][name], expected, rtol=1e-3, atol=1e-5)
    assert all(p.abs().max() > 1e-3 for p in record.deltas[-1].values())


def mean_nll(model: PeftModel, held: dict[str, Tensor], rows: Dataset, tokenizer: Any) -> Tensor:
    """Mean over all answer tokens, with the deltas put into the forward pass by name."""
    total, count = torch.zeros(()), 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        logits = torch.func.functional_call(model, held, kwargs={"input_ids": ids}).logits
        targets = ids[0, len(prompt) :]
        total = total + nn.functional.cross_entropy(logits[0, len(prompt) - 1 : -1], targets, reduction="sum")
        count += len(targets)
    return total / count


def test_a_fresh_projected_adapter_is_the_base(make_trainer: Callable[..., UnlearningTrainer], build: Any) -> None:
    """With a learning rate of 0, a step of everything leaves every bit of what the model says."""
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = build.model().eval()(input_ids=ids).logits
    for delta_type in ("full", "low_rank"):
        model = build.uoe(build.model(), delta_type=delta_type, router_delta_type=delta_type, r=3)
        trainer = make_trainer(model, retain_projection=RHO, learning_rate=0.0, weight_decay=0.0)
        trainer.train()
        with torch.no_grad():
            assert torch.equal(trainer.model.eval()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "sophia"])
def test_low_rank_deltas_stay_in_the_projected_space(
    make_trainer: Callable[..., UnlearningTrainer], build: Any, tokenizer: Any, sets: Any, optim: str
) -> None:
    """Retain directions, as eigenvectors of the moments, are damped in `A P` as P damps them in A."""
    model = build.uoe(build.model(), delta_type="low_rank", router_delta_type="low_rank", r=3)
    first = {e.name: e.parameter.detach().clone() for e in edited_parameters(model)}
    matrices = projections(model, sets[1], tokenizer)
    trainer = make_trainer(model, retain_projection=RHO, optim=optim, learning_rate=1e-12, weight_decay=0.0)
    trainer.train()
    for edited in edited_parameters(model):
        expected = first[edited.name] @ matrices[short(edited.name)]
        torch.testing.assert_close(edited.parameter.detach(), expected, rtol=1e-3, atol=1e-4)


def test_resuming_is_going_on(make_trainer: Callable[..., UnlearningTrainer], build: Any, tmp_path: Any) -> None:
    options = {"retain_projection": RHO, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(build.uoe(build.model(), delta_type="low_rank", r=3), **options)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert (checkpoint / MOMENTS_FILE).is_file() and (checkpoint / TRAINED_FILE).is_file()
    again = make_trainer(build.uoe(build.model(), delta_type="low_rank", r=3), **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    for (name, expected), found in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
    (checkpoint / MOMENTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="it was trained without retain_projection"):
        make_trainer(build.uoe(build.model(), delta_type="low_rank", r=3), **options).train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_going_on_with_a_trained_adapter_begins_where_it_was(
    make_trainer: Callable[..., UnlearningTrainer], build: Any
) -> None:
    model = build.uoe(build.model(), init_weights=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(model, retain_projection=RHO, learning_rate=0.0, weight_decay=0.0).train()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-4, atol=1e-5)


def test_an_interrupted_step_leaves_deltas(make_trainer: Callable[..., UnlearningTrainer], build: Any) -> None:
    class Stop(torch.optim.AdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            Stop.calls += 1
            if Stop.calls == 2:
                raise KeyboardInterrupt
            return super().step(closure)

    record, model = Record(), build.uoe(build.model())
    optimiser = Stop([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    trainer = make_trainer(model, retain_projection=RHO, callbacks=[record], max_steps=3)
    trainer.optimizer = optimiser
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(p.any() for p in trained.values())
    for name, p in trained.items():
        assert torch.equal(p, record.deltas[0][name])
        assert not p._backward_hooks
    assert not optimiser._optimizer_step_pre_hooks and not optimiser._optimizer_step_post_hooks


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx", "listed, router module"])
@pytest.mark.parametrize("delta_type", ["full", "low_rank"])
def test_every_layout_is_multiplied_on_the_side_of_its_inputs(build: Any, family: str, delta_type: str) -> None:
    """A projection onto one input direction leaves deltas that only see this direction."""
    base = build_family(family)
    layer_idx = 2
    config = {"target_experts": [(layer_idx, 1), (layer_idx, 4)], "delta_type": delta_type, "r": 3}
    model = PeftModel(base, UOEConfig(**config, router_delta_type=delta_type))
    batch = {
        "input_ids": torch.randint(3, 50, (12, 60), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(12, 60, dtype=torch.int64),
    }

    class FirstInput(RetainProjection):
        def projection(self, retain: Any, forget: Any) -> Tensor:
            matrix = 1e-9 * torch.eye(retain.dimension).double()
            matrix[0, 0] = 1
            return matrix

    def measure(role: str) -> Any:
        return moments_of_edits(model, [batch], name=role)

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trainable, lr=1.0)
    callback = FirstInput(model, measure, rho=1.0)
    callback.on_train_begin(None, None, None, optimizer=optimiser)
    edited = edited_parameters(model)
    assert {name.layer_idx for own in edited for name in own.slices} == {layer_idx}
    for own in edited:
        own.parameter.grad = torch.ones_like(own.parameter)
    optimiser.step()
    callback.release()
    for own in edited:
        inputs = own.parameter.detach().abs().amax(dim=(0, 2) if own.inputs_first else (0, 1))
        assert inputs[0] > 0.1 and inputs[1:].max() < 1e-6


def test_all_slices_are_those_that_moments_name(build: Any) -> None:
    model = PeftModel(build_family("listed, router module"), UOEConfig(target_experts=[(1, 2), (2, 0)]))
    names = {str(name) for own in edited_parameters(model) for name in own.slices}
    assert names == {
        *(f"layer {layer}, expert {e}, {p}_proj" for layer, e in ((1, 2), (2, 0)) for p in ("gate", "up", "down")),
        "layer 1, router",
        "layer 2, router",
    }
    ids = torch.randint(3, 50, (8, 30))
    found = measure_moments(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], [(1, 2), (2, 0)])
    assert {str(name) for name in found.slices} == names


def test_the_share_that_survives_is_logged(make_trainer: Callable[..., UnlearningTrainer], caplog: Any) -> None:
    caplog.set_level("INFO", logger="uoe_peft")
    make_trainer(retain_projection=RHO, max_steps=1).train()
    (line,) = (record.getMessage() for record in caplog.records if "retain projection" in record.getMessage())
    assert all(part in line for part in ("rho 0.3", "layer 1, expert 2, down_proj: ", "layer 1, router: "))


def test_a_retain_set_that_no_loss_reads_is_measured(make_trainer: Callable[..., UnlearningTrainer]) -> None:
    trainer = make_trainer(retain_projection=RHO, forget_loss="grad_ascent", retain_loss="none", max_steps=1)
    trainer.train()
    assert any(p.any() for p in trainer.model.parameters() if p.requires_grad)


def test_bad_input_is_named(make_trainer: Callable[..., UnlearningTrainer], build: Any) -> None:
    for rho in (0.0, -1.0, float("nan"), True):
        with pytest.raises(ValueError, match="retain_projection must be None or a rho > 0"):
            make_trainer(retain_projection=rho)
    with pytest.raises(ValueError, match="retain_projection needs a retain set"):
        make_trainer(retain="none", retain_projection=1.0, forget_loss="grad_ascent", retain_loss="none")
    with pytest.raises(ValueError, match=r"which weight_mask_ratio=0\.5 cannot have"):
        make_trainer(retain_projection=1.0, weight_mask_ratio=0.5)
    with pytest.raises(ValueError, match="sophia_estimator='hutchinson' cannot have"):
        make_trainer(retain_projection=1.0, optim="sophia", sophia_estimator="hutchinson")
    with pytest.raises(ValueError, match="acts on UOE deltas, and the model has none"):
        make_trainer(build.lora(build.model()), retain_projection=1.0).train()
