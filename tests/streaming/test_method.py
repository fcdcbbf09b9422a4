"""The whole method on more than twenty families: streamed and resident, every bit of what it finds is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from tests.streaming.conftest import SaveFamily
from tests.training.conftest import make_args, make_sets
from uoe_peft import ExpertAttribution, UOEConfig, attribute_experts
from uoe_peft.attribution.sampling import sample_batches
from uoe_peft.moments import measure_moments
from uoe_peft.streaming import StreamedModel
from uoe_peft.training import UnlearningTrainer

FAMILIES = [
    "afmoe",
    "cohere2_moe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "lfm2_moe",
    "llama4",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen3_moe",
    "qwen3_next",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning"),
]


def attributed(model: Any, sets: tuple[Dataset, Dataset], tokenizer: Any) -> ExpertAttribution:
    """What attribution finds."""
    return attribute_experts(model, sets[0], processing_class=tokenizer, batch_size=4, show_progress=False)


def moments(model: Any, rows: Dataset, tokenizer: Any, target: tuple[int, int]) -> dict[str, Tensor]:
    batches = sample_batches(rows, tokenizer, max_tokens=300, batch_size=4, max_length=None, seed=0, name="retain")
    measured = measure_moments(model, batches, [target], strict=False)
    return {str(name): own.second for name, own in measured.slices.items()}


def adapter(
    model: Any, sets: tuple[Dataset, Dataset], tokenizer: Any, target: tuple[int, int], folder: str
) -> dict[str, Tensor]:
    """What two steps of RMU make of an adapter."""
    trainer = UnlearningTrainer(
        model=model,
        args=make_args(output_dir=folder, max_steps=2, forget_loss="rmu", retain_loss="embed_diff"),
        train_dataset=sets[0],
        retain_dataset=sets[1],
        processing_class=tokenizer,
        peft_config=UOEConfig(target_experts=[target]),
    )
    trainer.train()
    return {name: p.detach() for name, p in trainer.model.named_parameters() if "uoe_" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_affinities_moments_and_the_trained_adapter(
    family: str, saved_family: SaveFamily, tokenizer: Any, tmp_path: Path
) -> None:
    folder, resident = saved_family(family)
    streamed: Any = StreamedModel.from_pretrained(folder, show_progress=False)
    sets = make_sets()
    expected, found = (attributed(model, sets, tokenizer) for model in (resident, streamed))
    assert torch.equal(found.affinity, expected.affinity)
    (target,) = expected.top(1)
    pairs = [
        (measure(resident), measure(streamed))
        for measure in (
            lambda model: moments(model, sets[1], tokenizer, target),
            lambda model: adapter(model, sets, tokenizer, target, str(tmp_path)),
        )
    ]
    for whole, read in pairs:
        assert whole.keys() == read.keys()
        assert all(torch.equal(value, read[name]) for name, value in whole.items())
        assert any(value.any() for value in whole.values())
