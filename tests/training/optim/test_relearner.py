"""Training against a relearner, compared with plain torch on a plain model: one vector of weights, one of offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.training.optim.relearner import Relearner

RATE, RELEARNER_RATE, BETA = 0.05, 1e-2, 0.1
SGD = {
    "optim": "sgd",
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "retain_loss": "none",
    "anchor_weight": 0.0,
    "calibrate": False,
    "train_sampling_strategy": "sequential",
    "relearner_rate": RELEARNER_RATE,
}


def plain_nll(model: nn.Module, values: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Negative log-likelihood of each answer, summed over its tokens."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = torch.func.functional_call(model, values, kwargs=inputs, tie_weights=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)


def forget_loss(name: str, nll: Tensor, batch: dict[str, Tensor], before: Tensor) -> Tensor:
    if name == "grad_ascent":
        return -nll.sum() / (batch["labels"][:, 1:] != -100).sum()
    return -(2 / BETA) * nn.functional.logsigmoid(BETA * (nll - before)).mean()


def by_hand(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    trained: Callable[[str, Tensor], Tensor],
    *,
    loss: str,
    renew: int,
) -> dict[str, Tensor]:
    """The weights in the end: SGD on two gradients, AdamW of the offsets written out."""
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = {name: value.clone() for name, value in base.items()}
    taken = 0
    offsets, first, second = ({name: torch.zeros_like(value) for name, value in base.items()} for _ in range(3))
    for batch in batches:
        before = plain_nll(model, base, batch).detach()
        gradients: list[tuple[Tensor, ...]] = []
        for values in (own, {name: own[name] + offsets[name] for name in own}):
            at = {name: value.detach().requires_grad_() for name, value in values.items()}
            nll = plain_nll(model, at, batch)
            number = (batch["labels"][:, 1:] != -100).sum()
            wanted = [*at.values()]
            gradients.append(torch.autograd.grad(forget_loss(loss, nll, batch, before), wanted, retain_graph=True))
            attack = torch.autograd.grad(nll.sum() / number, wanted)
        for name, one, other in zip(own, *gradients, strict=True):
            own[name] = own[name] - RATE * trained(name, one + other)
        taken += 1
        if taken == renew:
            taken = 0
            offsets, first, second = ({name: torch.zeros_like(value) for name, value in base.items()} for _ in range(3))
            continue
        for name, gradient in zip(own, attack, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, energy = first[name] / (1 - 0.9**taken), second[name] / (1 - 0.999**taken)
            offsets[name] = offsets[name] - RELEARNER_RATE * mean / (energy.sqrt() + 1e-8)
    return own


def everything(name: str, gradient: Tensor) -> Tensor:
    return gradient


def expert_and_router(name: str, gradient: Tensor) -> Tensor:
    """What the adapter of the fixtures edits: expert 2 of layer 1, and the layer's router."""
    kept = torch.zeros_like(gradient)
    if "layers.1.mlp.experts" in name:
        kept[2] = gradient[2]
    if "layers.1.mlp.gate.weight" in name:
        kept = gradient
    return kept


@pytest.mark.parametrize("loss", ["grad_ascent", "npo"])
@pytest.mark.parametrize(("part", "steps", "renew"), [("all", 4, 3), ("uoe", 4, 3), ("uoe", 2, 9)])
def test_training_is_that_of_plain_torch(
    build: Any, make_trainer: Any, tokenizer: Any, sets: Any, loss: str, part: str, steps: int, renew: int
) -> None:
    model = build.model()
    rows = [dict(row) for row in tokenize_dataset(sets[0], tokenizer, max_length=None, name="forget")]
    halves = [collate(rows[:4], pad_token_id=0), collate(rows[4:], pad_token_id=0)]
    trained = everything if part == "all" else expert_and_router
    expected = by_hand(model, (halves * 2)[:steps], trained, loss=loss, renew=renew)
    options = {**SGD, "forget_loss": loss, "beta": BETA if loss == "npo" else None, "max_steps": steps}
    trainer = make_trainer(model if part == "all" else build.uoe(model), relearner_steps=renew, **options)
    trainer.train()
    found = trainer.model if part == "all" else trainer.model.merge_and_unload()
    moved = 0
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=2e-6)
        moved += int((parameter.detach() != dict(build.model().named_parameters())[name]).any())
    assert moved >= 3


def test_parts_of_a_batch_give_what_the_whole_gives(make_trainer: Any) -> None:
    weights = []
    for parts in (1, 2):
        size = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
        options = {**SGD, "forget_loss": "grad_ascent", "max_steps": 3, "relearner_steps": 9}
        trainer = make_trainer(**options, **size)
        trainer.train()
        weights.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    for whole, parted in zip(*weights, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-4, atol=1e-7)


def test_weights_are_what_they_were_whatever_happens_inside(uoe_model: nn.Module) -> None:
    relearner = Relearner(uoe_model, learning_rate=1e-2, num_steps=2)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in uoe_model.named_parameters()}
    for offset in relearner.offsets:
        offset.data.fill_(1 / 3)
    with pytest.raises(KeyError, match="inside"), relearner.applied():
        assert all(p.requires_grad for p in uoe_model.parameters())
        moved = uoe_model.get_base_model().model.layers[0].self_attn.q_proj.weight
        assert not torch.equal(moved, before["base_model.model.model.layers.0.self_attn.q_proj.weight"][0])
        raise KeyError("inside")
    for name, parameter in uoe_model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


def test_numpys_numbers_are_numbers(make_trainer: Any) -> None:
    args = make_trainer(relearner_steps=np.int64(3), relearner_rate=np.float32(0.5)).args
    assert (type(args.relearner_steps), args.relearner_steps, args.relearner_rate) == (int, 3, 0.5)


def test_the_log_says_how_far_answers_come_back(make_trainer: Any) -> None:
    trainer = make_trainer(
        forget_loss="npo", max_steps=3, learning_rate=0.0, calibrate=False, relearner_steps=9, relearner_rate=2e-2
    )
    trainer.train()
    logged = [entry["relearned_nll"] for entry in trainer.state.log_history if "relearned_nll" in entry]
    plain = [entry["forget_nll"] for entry in trainer.state.log_history if "forget_nll" in entry]
    assert logged[0] == pytest.approx(plain[0], abs=1e-3)  # he begins at the model's own weights
    assert logged[2] < plain[2] - 0.1  # and gains on a model that stands still
    assert trainer._relearner is None  # his memory is given back


def test_where_the_prefix_cache_would_be_wrong_there_is_none(make_trainer: Any) -> None:
    trainer = make_trainer(relearner_steps=3, prefix_cache=True, max_steps=4)
    with pytest.raises(ValueError, match="relearner_steps=3 moves every layer"):
        trainer.train()


def test_a_relearner_that_runs_away_is_told_of(make_trainer: Any) -> None:
    trainer = make_trainer(relearner_steps=9, relearner_rate=1e30, max_steps=4)
    with pytest.raises(FloatingPointError, match=r"after 1 steps of a simulated relearning .* lower relearner_rate=1e"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relearner_steps": -1}, "relearner_steps must be an integer >= 0"),
        ({"relearner_steps": True}, "relearner_steps must be an integer >= 0"),
        ({"relearner_steps": 1.5}, "relearner_steps must be an integer >= 0"),
        ({"relearner_rate": 0.0}, "relearner_rate must be a finite number > 0, got 0.0"),
        ({"relearner_rate": float("nan")}, "relearner_rate must be a finite number > 0, got nan"),
        ({"relearner_steps": 4, "forget_loss": "undial"}, "relearner_steps=4 does not go with forget_loss='undial'"),
        ({"relearner_steps": 4, "gradient_checkpointing": True}, "does not go with gradient_checkpointing=True"),
    ],
)
def test_bad_settings_are_refused(make_trainer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_weights_in_half_precision_are_refused(make_trainer: Any, build: Any) -> None:
    model = build.uoe(build.model().to(torch.bfloat16))
    with pytest.raises(ValueError, match="does not go with weights that are not float32"):
        make_trainer(model, relearner_steps=4)
