"""Losses and gradients from the cache are those of the whole model, whatever the family, attention and padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from tests.families import build
from tests.tuner.conftest import randomise
from uoe_peft.data import Batch, collate
from uoe_peft.data.encoding import example_id
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.routing import record_routing
from uoe_peft.training import UnlearningConfig
from uoe_peft.training.objective.anchor import find_targets
from uoe_peft.training.objective.objective import Objective
from uoe_peft.training.objective.reference import Reference
from uoe_peft.training.reuse.prefix_cache import PrefixSource, prefix_cache
from uoe_peft.training.reuse.store import StateFolder
from uoe_peft.tuner import UOEConfig

# Softmax and sigmoid routers, shared experts, dense first layers, hybrids with convolutions and state spaces, chunked
# and sliding attention, experts in a list.
BOTH_KERNELS = (
    *("afmoe", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo"),
    *("glm4_moe", "granitemoe", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "llama4", "minimax_m2"),
    *("mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "solar_open"),
)
CASES = [(family, kernel) for family in BOTH_KERNELS for kernel in ("eager", "sdpa")]
CASES += [("gpt_oss", "eager"), ("listed, linear router", "eager")]

every_family_and_kernel = pytest.mark.parametrize(("family", "attention"), CASES)


@every_family_and_kernel
def test_not_a_bit_differs_at_equal_batch_shapes_also_where_training_is_taken_up_again(
    family: str, attention: str, tmp_path: Path
) -> None:
    training = Training.of(family, attention)
    batches = {"forget": batch_of([7, 7, 7], start=0), "retain": batch_of([7, 7, 7], start=40)}
    expected = training.step(batches)
    for _ in ("built", "found again"):
        with training.from_cache(batches, directory=tmp_path):
            assert_equal(training.step(batches), expected, tolerance=0)
    assert len(list(tmp_path.glob("*.states"))) == 1


@every_family_and_kernel
def test_padding_on_either_side_differs_by_rounding_only(family: str, attention: str) -> None:
    training = Training.of(family, attention)
    lengths = {"forget": [5, 3, 7], "retain": [6, 8, 4]}
    sides = {
        side: {role: batch_of(lengths[role], start=start, side=side) for role, start in (("forget", 0), ("retain", 40))}
        for side in ("right", "left")
    }
    expected = {side: training.step(batches) for side, batches in sides.items()}
    with training.from_cache(sides["right"]):
        for side, batches in sides.items():
            assert_equal(training.step(batches), expected[side], tolerance=1e-5)


@dataclass(frozen=True)
class Training:
    """A tiny model of a family with an edited expert in its last layer of experts, and NPO with nll and anchor."""

    model: PeftModel
    objective: Objective

    @classmethod
    def of(cls, family: str, attention: str) -> Training:
        base = build(family)
        base.set_attn_implementation(attention)
        layer_idx = find_moe_blocks(base)[-1].layer_idx
        with torch.no_grad(), record_routing(base, layer_indices=[layer_idx]) as trace:
            base(input_ids=batch_of([7, 7, 7], start=0)["input_ids"], use_cache=False)
        busiest = int(trace[layer_idx].top_k_index.flatten().bincount().argmax())
        model = get_peft_model(base, UOEConfig(target_experts=[(layer_idx, busiest)]))
        randomise(model)
        args = UnlearningConfig(output_dir="unused", use_cpu=True, report_to=[], forget_loss="npo", retain_loss="nll")
        return cls(model.eval(), Objective(args, Reference(model), find_targets(model)))

    def step(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Losses and gradients by name."""
        self.model.zero_grad()
        targets = self.objective.targets
        with record_routing(self.model, layer_indices=sorted(targets)) as trace:
            step = self.objective.step(self.model, batches, trace, {})
        step.loss(self.objective.args).backward()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: term.detach() for name, term in step.terms.items()} | {n: p.grad for n, p in trained.items()}

    @contextmanager
    def from_cache(self, batches: Mapping[str, Batch], directory: Path | None = None) -> Iterator[None]:
        """Inside the context steps start at the edited layer: layer 0 is not run."""
        rows = [
            ids[mask.bool()]
            for b in batches.values()
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        ]
        source = PrefixSource(self.model, 3, 0, place=lambda batch: batch, context=torch.no_grad)
        with prefix_cache(source, [row.tolist() for row in rows], folder=directory and StateFolder(directory)) as cache:
            calls: list[str] = []
            first = cache.layers.get_submodule("0")
            handle = first.register_forward_hook(lambda *_: calls.append("layer 0"))
            with cache.serve(self.model):
                yield
            handle.remove()
            assert calls == []


def batch_of(lengths: list[int], *, start: int, side: str = "right") -> Batch:
    """A batch whose rows have answers from their third token on."""
    rows = [[3 + (start + 7 * row + 5 * column) % 90 for column in range(n)] for row, n in enumerate(lengths)]
    examples = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows]
    ids = [example_id(example["input_ids"], example["labels"]) for example in examples]
    return collate(examples, pad_token_id=0, padding_side=side) | {"id": torch.tensor(ids)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """The difference's norm is within a share of the norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name
