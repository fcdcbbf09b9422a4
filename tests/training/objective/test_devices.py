"""A model whose layers are on several devices: losses, routing and masks meet on the batch's device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.pretend_devices import device, pretend_devices, spread
from uoe_peft.data import collate_groups
from uoe_peft.moe.routing import record_routing
from uoe_peft.moe.routing_shift import selected_experts, selection_overlap
from uoe_peft.training import UnlearningConfig
from uoe_peft.training.objective.build import build_objective
from uoe_peft.training.optim.masks import weight_attribution_mask

ROWS = [
    {
        "forget": {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "id": 30, "seed": 1},
        "retain": {"input_ids": [15, 16, 17], "labels": [-100, 16, 17], "id": 1, "seed": 2},
        "alternative": {"input_ids": [5, 6, 20], "labels": [-100, -100, 20], "id": 31, "seed": 1},
    },
    {
        "forget": {"input_ids": [9, 10, 11], "labels": [-100, -100, 11], "id": 10, "seed": 3},
        "retain": {"input_ids": [30, 31, 32, 33], "labels": [-100, -100, -100, 33], "id": 4, "seed": 4},
        "alternative": {"input_ids": [9, 10, 21, 22], "labels": [-100, -100, 21, 22], "id": 11, "seed": 3},
    },
]
BOTH = [(1, 2), (2, 4)]  # a target on either side of the cut


def edited(build: Any) -> nn.Module:
    torch.manual_seed(3)
    model = build.uoe(build.model(), target_experts=BOTH)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    return model


def batches_on(place: torch.device) -> Any:
    groups = collate_groups(ROWS, pad_token_id=0)
    return {role: {name: value.to(place) for name, value in batch.items()} for role, batch in groups.items()}


def step_of(model: nn.Module, args: Any, place: torch.device, *, chunks: bool = False) -> Any:
    objective = build_objective(model, args, device=place)
    objective.reference.logits_at_once = 3 * 97 if chunks else None
    with record_routing(model, layer_indices=[1, 2], device=place) as trace:
        step = objective.step(model, batches_on(place), trace, {})
    gradients = torch.autograd.grad(step.loss(args), [p for p in model.parameters() if p.requires_grad])
    return {name: float(value.detach()) for name, value in {**step.terms, **step.metrics}.items()}, gradients


@pytest.mark.parametrize(
    ("forget_loss", "retain_loss", "chunks"),
    [
        ("npo", "kl", False),
        ("undial", "nll", True),
        ("dpo", "nll", False),
        ("rmu", "embed_diff", False),
    ],
)
def test_losses_and_gradients_are_those_of_one_device(build, monkeypatch, forget_loss, retain_loss, chunks) -> None:
    args = UnlearningConfig(
        forget_loss=forget_loss, retain_loss=retain_loss, retain_token_weights="none", output_dir="out", use_cpu=True
    )
    expected, expected_gradients = step_of(edited(build), args, torch.device("cpu"), chunks=chunks)
    with pretend_devices(monkeypatch):
        model = edited(build)
        spread(model.get_base_model(), last=1)
        found, gradients = step_of(model, args, device(0), chunks=chunks)
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_masks_and_overlaps_are_those_of_one_device(build, monkeypatch) -> None:
    def found(model: nn.Module, place: torch.device) -> Any:
        batch = batches_on(place)["forget"]
        masks = weight_attribution_mask(model, [batch], None, ratio=0.3)
        with torch.no_grad():
            now = selected_experts(model, batch)
            before = {layer_idx: index.roll(1, dims=0) for layer_idx, index in now.items()}
            overlap = selection_overlap(model, now, before, mask=batch["attention_mask"])
        return [mask.tolist() for mask in masks.values()], float(overlap)

    expected = found(edited(build), torch.device("cpu"))
    with pretend_devices(monkeypatch):
        model = edited(build)
        spread(model.get_base_model(), last=1)
        assert found(model, device(0)) == expected


def test_places_may_not_meet(monkeypatch) -> None:
    with pretend_devices(monkeypatch):
        here, there = torch.ones(2).to(device(0)), torch.ones(2).to(device(1))
        with pytest.raises(RuntimeError, match="meet"):
            here + there
        assert (here + there.to(here)).device == device(0)
