"""Every loss through `train()`: its values, gradients and weights are those of the formulas in `plain.py`.

Each run has unequal answer lengths, two micro-batches a step of which the last is short, and two epochs, with plain
gradient descent: an error of any step is carried into the next.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from tests.training.conftest import make_args, make_model, make_tokenizer, with_uoe
from tests.training.objective.plain import Objective, forget_set, retain_set
from uoe_peft.moe.routing import record_routing
from uoe_peft.training import UnlearningTrainer
from uoe_peft.training.optim.curvature import estimate_curvature

RATE = 0.05
STEPS = 3

# What the trainer is told, and what that means.
CASES = {
    "grad_ascent": ({"forget_loss": "grad_ascent"}, Objective()),
    "npo": ({"forget_loss": "npo", "beta": 0.3}, Objective("npo", options={"beta": 0.3})),
    "npo, mean": (
        {"forget_loss": "npo", "beta": 1.7, "npo_reduction": "mean"},
        Objective("npo, mean", options={"beta": 1.7}),
    ),
    "simnpo": (
        {"forget_loss": "simnpo", "beta": 2.5, "simnpo_delta": 0.4},
        Objective("simnpo", options={"beta": 2.5, "delta": 0.4}),
    ),
    "dpo": ({"forget_loss": "dpo", "beta": 0.2}, Objective("dpo", options={"beta": 0.2})),
    "idk": ({"forget_loss": "idk"}, Objective("idk")),
    "npo, alternative": (
        {"forget_loss": "npo", "beta": 0.3, "alternative_weight": 0.6},
        Objective("npo", options={"beta": 0.3, "alternative_weight": 0.6}),
    ),
    "undial": ({"forget_loss": "undial", "beta": 3.0}, Objective("undial", options={"beta": 3.0})),
    "wga": ({"forget_loss": "wga", "beta": 0.5}, Objective("wga", options={"beta": 0.5})),
    "satimp": (
        {"forget_loss": "satimp", "satimp_beta1": 0.5, "satimp_beta2": 2.0},
        Objective("satimp", options={"beta1": 0.5, "beta2": 2.0}),
    ),
    "random_label": ({"forget_loss": "random_label"}, Objective("random_label")),
    "adversarial_label": ({"forget_loss": "adversarial_label"}, Objective("adversarial_label")),
    "rmu": (
        {"forget_loss": "rmu", "rmu_coefficient": 4.5, "rmu_seed": 7, "rmu_layer": 2},
        Objective("rmu", layer=2, options={"c": 4.5, "seed": 7}),
    ),
    "rmu, adaptive": (
        {"forget_loss": "rmu", "beta": 1.5, "rmu_seed": 3, "retain_loss": "embed_diff"},
        Objective("rmu", "embed_diff", options={"beta": 1.5, "seed": 3}),
    ),
    "no retain loss": ({"retain_loss": "none", "forget_loss": "grad_ascent"}, Objective(retain_loss="none")),
    "kl": ({"retain_loss": "kl", "forget_loss": "grad_ascent"}, Objective(retain_loss="kl")),
    "embed_diff": (
        {"retain_loss": "embed_diff", "rmu_layer": 2, "forget_loss": "grad_ascent"},
        Objective(retain_loss="embed_diff", layer=2),
    ),
    "embed_diff, last layer": (
        {"retain_loss": "embed_diff", "rmu_layer": -1, "forget_loss": "grad_ascent"},
        Objective(retain_loss="embed_diff", layer=2),
    ),
    "relative_embed_diff": (
        {"retain_loss": "relative_embed_diff", "rmu_layer": -1, "forget_loss": "grad_ascent"},
        Objective(retain_loss="relative_embed_diff", layer=2),
    ),
    "trace": (
        {"retain_token_weights": "trace", "trace_cap": 1.2, "forget_loss": "grad_ascent"},
        Objective(options={"cap": 1.2}, targets={0: [1, 4], 1: [2]}),
    ),
    "anchor, topk": ({"anchor_scores": "topk", "forget_loss": "grad_ascent"}, Objective(options={"scores": "topk"})),
    "anchor, mean_gate": (
        {"anchor_reduction": "mean_gate", "forget_loss": "grad_ascent"},
        Objective(options={"reduction": "mean_gate"}),
    ),
    "anchor, several": ({"forget_loss": "grad_ascent"}, Objective(targets={0: [3], 2: [1, 5]})),
}
# A model that is trained in full is asked what the base model says before its first step.
IN_FULL = ("npo", "dpo", "rmu, adaptive", "simnpo")


class KeepSteps(TrainerCallback):
    """The rows of each micro-batch, and the gradient of each optimiser step."""

    def __init__(self) -> None:
        self.parts: list[list[dict[str, Any]]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parts.append([])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def watch(self, trainer: UnlearningTrainer) -> None:
        training_step = trainer.training_step

        def step(model: Any, inputs: dict[str, Any], *args: Any) -> Any:
            rows = {role: batch["index"].tolist() for role, batch in inputs.items()}
            self.parts[-1].append({**rows, "seed": inputs["forget"]["seed"].tolist()})
            return training_step(model, inputs, *args)

        trainer.training_step = step


@torch.no_grad()
def edited(objective: Objective) -> Any:
    """A model with an adapter that has been trained already: nothing is at its starting value."""
    pairs = [(layer, expert) for layer, experts in objective.targets.items() for expert in experts]
    model = with_uoe(make_model(), target_experts=pairs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.05 * torch.randn_like(parameter))
    return model


def by_hand(objective: Objective, model: Any) -> torch.nn.Module:
    """The base model with the adapter's deltas added to its weights by hand; the weights it edits are trainable."""
    plain = make_model().requires_grad_(False)
    for name, delta in model.named_parameters():
        if delta.requires_grad:
            weight, rows = weight_of(plain, objective, name)
            weight.data[rows] += delta.detach().reshape(weight.data[rows].shape)
            weight.requires_grad_(True)
    return plain


def weight_of(plain: torch.nn.Module, objective: Objective, name: str) -> tuple[torch.nn.Parameter, Any]:
    """The stacked weight that a delta edits, and which of its experts."""
    layer = int(re.search(r"layers\.(\d+)\.", name)[1])
    block = plain.model.layers[layer].mlp
    if name.endswith("weight"):
        return block.gate.weight, slice(None)
    return getattr(block.experts, name.rsplit(".", 1)[1]), sorted(objective.targets[layer])


def train(tmp_path: Any, model: Any, **options: Any) -> tuple[UnlearningTrainer, KeepSteps]:
    args = make_args(
        output_dir=str(tmp_path),
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "forget_weight": 0.7,
            "retain_weight": 1.3,
            "anchor_weight": 0.4,
            **options,
        },
    )
    watch = KeepSteps()
    trainer = UnlearningTrainer(
        model,
        args,
        train_dataset=forget_set(),
        retain_dataset=retain_set(),
        processing_class=make_tokenizer(),
        callbacks=[watch],
    )
    watch.watch(trainer)
    return trainer, watch


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], *, tolerance: float = 2e-4) -> None:
    found_, expected_ = (torch.cat([x.flatten() for x in side]) for side in (found, expected))
    assert expected_.norm() > 0
    assert (found_ - expected_).norm() <= tolerance * expected_.norm()


def check_terms(logged: dict[str, float], terms: dict[str, torch.Tensor]) -> None:
    assert {name for name in logged if name.startswith("loss_")} == {f"loss_{name}" for name in terms}
    for name, term in terms.items():
        assert logged[f"loss_{name}"] == pytest.approx(term.item(), rel=2e-4, abs=1e-6), name


def check_rows(watch: KeepSteps) -> None:
    first_epoch = [i for step in watch.parts[:2] for part in step for i in part["forget"]]
    assert sorted(first_epoch) == list(range(7))
    assert [[len(part["forget"]) for part in step] for step in watch.parts] == [[2, 2], [2, 1], [2, 2]]
    drawn = [seed for step in watch.parts for part in step for seed in part["seed"]]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_is_trained_as_the_formula_says(tmp_path, name):
    options, objective = CASES[name]
    model, base = edited(objective), make_model()
    plain = by_hand(objective, model)
    trainer, watch = train(tmp_path, model, **options)
    trainer.train()
    check_rows(watch)
    start = copy.deepcopy(plain)
    trained = [weight for weight in plain.parameters() if weight.requires_grad]
    for parts, found, logged in zip(watch.parts, watch.gradients, trainer.state.log_history, strict=False):
        terms = objective.terms(plain, base, parts)
        check_terms(logged, terms)
        gradients = dict(zip(trained, torch.autograd.grad(objective.loss(terms), trained), strict=True))
        slices = [(gradient, *weight_of(plain, objective, n)) for n, gradient in found.items()]
        assert_close([g for g, _, _ in slices], [gradients[weight][rows] for _, weight, rows in slices])
        for _, weight, rows in slices:
            weight.data[rows] -= RATE * gradients[weight][rows]
    whole = trainer.model.merge_and_unload()
    edits = [
        [(after - before).detach() for after, before in zip(side.parameters(), start.parameters(), strict=True)]
        for side in (whole, plain)
    ]
    assert_close(*edits)


@pytest.mark.parametrize("name", IN_FULL)
def test_a_model_in_full_is_trained_as_the_formula_says(tmp_path, name):
    options, adapted = CASES[name]
    objective = Objective(adapted.forget_loss, adapted.retain_loss, targets={}, options=adapted.options)
    base, plain = make_model(), make_model()
    trainer, watch = train(tmp_path, make_model(), **{**options, "rmu_layer": 1, "learning_rate": RATE / 50})
    trainer.train()
    check_rows(watch)
    weights = dict(plain.named_parameters())
    for parts, found, logged in zip(watch.parts, watch.gradients, trainer.state.log_history, strict=False):
        terms = objective.terms(plain, base, parts)
        check_terms(logged, terms)
        gradients = torch.autograd.grad(objective.loss(terms), list(weights.values()), allow_unused=True)
        expected = {n: g for n, g in zip(weights, gradients, strict=True) if g is not None}
        assert {n for n, g in found.items() if g.any()} == {n for n, g in expected.items() if g.any()}
        assert_close([found[n] for n in expected], list(expected.values()))
        for n, gradient in expected.items():
            weights[n].data -= RATE / 50 * gradient


@pytest.mark.parametrize("name", ["npo", "undial", "adversarial_label", "random_label", "kl"])
def test_logits_made_in_chunks_are_trained_as_the_formula_says(tmp_path, name, monkeypatch):
    monkeypatch.setattr("uoe_peft.training.reuse.shortcuts.LOGITS_AT_ONCE", 5 * 97)
    test_an_adapter_is_trained_as_the_formula_says(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "beta"), [("npo", 0.1), ("dpo", 0.1), ("simnpo", 4.5), ("undial", 10.0), ("wga", 1.0)]
)
def test_defaults_are_the_papers(tmp_path, name, beta):
    options, objective = CASES[name]
    chosen = {k: v for k, v in options.items() if k == "forget_loss"}
    usual = Objective(objective.forget_loss, options={"beta": beta, "delta": 0.0})
    model, base = edited(usual), make_model()
    plain = by_hand(usual, model)
    trainer, watch = train(tmp_path, model, max_steps=1, **chosen)
    trainer.train()
    check_terms(trainer.state.log_history[0], usual.terms(plain, base, watch.parts[0]))


def test_hutchinson_is_of_the_objective_that_is_minimised(tmp_path, monkeypatch):
    """Along chosen signs, which the test knows: u * (H u)."""
    objective = Objective("npo", options={"beta": 0.3})
    model, base = edited(objective), make_model()
    plain = by_hand(objective, model)
    trainer, _ = train(
        tmp_path, model, forget_loss="npo", beta=0.3, optim="sophia", sophia_estimator="hutchinson", learning_rate=1e-6
    )
    rows = [trainer.train_dataset[i] for i in (1, 4)]
    part = {role: [row[role]["index"] for row in rows] for role in ("forget", "retain")} | {"seed": [0, 0]}

    def signs(like: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.arange(like.numel()).remainder(3).clamp(max=1).view_as(like)

    monkeypatch.setattr(torch, "randint_like", signs)
    with record_routing(trainer.model, layer_indices=[1]) as trace:
        found = estimate_curvature(trainer.objective, trainer.data_collator(rows), trace)
    named = {n: found[p] for n, p in trainer.model.named_parameters() if p in found}
    trained = [weight for weight in plain.parameters() if weight.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        loss = objective.loss(objective.terms(plain, base, [part]))
        gradients = dict(zip(trained, torch.autograd.grad(loss, trained, create_graph=True), strict=True))
        slices = [(estimate, *weight_of(plain, objective, n)) for n, estimate in named.items()]
        chosen = [signs(estimate).float() * 2 - 1 for estimate, _, _ in slices]
        along = sum((gradients[w][r] * u.view_as(w[r])).sum() for (_, w, r), u in zip(slices, chosen, strict=True))
        curved = dict(zip(trained, torch.autograd.grad(along, trained), strict=True))
    expected = [u.view_as(w[r]) * curved[w][r] for (_, w, r), u in zip(slices, chosen, strict=True)]
    assert_close([e for e, _, _ in slices], expected, tolerance=2e-3)
