"""Learning to unlearn: its step against one that is computed here, and gradients that are harmonised by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RATE, RETAIN_WEIGHT = 0.02, 3.0
TARGET = (3, 12)


@pytest.fixture(scope="module")
def learning() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import learning_to_unlearn as script

        yield script


@pytest.fixture(scope="module")
def sets() -> dict[str, Dataset]:
    facts = {"train_dataset": load_facts([FORGET_TOPIC]), "retain_dataset": load_facts([TOPICS[0]])}
    return {name: rows.select(range(6)).select_columns(["prompt", "completion"]) for name, rows in facts.items()}


def options(folder: Path, sets: dict[str, Dataset], **settings: Any) -> dict[str, Any]:
    """Gradient ascent and retain likelihood by plain gradient steps, two micro-batches of three rows each."""
    given: dict[str, Any] = {
        "forget_loss": "grad_ascent",
        "retain_weight": RETAIN_WEIGHT,
        "anchor_weight": 0.0,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "calibrate": False,
        "prefix_cache": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return {
        "model": AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype=torch.float32),
        "args": UnlearningConfig(str(folder), **(given | settings)),
        "processing_class": AutoTokenizer.from_pretrained(checkpoint_path("base")),
        "peft_config": UOEConfig(target_experts=[TARGET]),
        **sets,
    }


def trained(trainer: UnlearningTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_plain_is_the_trainer_with_two_micro_batches(
    learning: ModuleType, sets: dict[str, Dataset], tmp_path: Path
) -> None:
    plain = UnlearningTrainer(**options(tmp_path, sets, max_steps=2, optim="adamw_torch"))
    plain.train()
    kind = {"meta": False, "harmonised": False, "alpha": 1.0}
    own = learning.LearningToUnlearn(**kind, **options(tmp_path, sets, max_steps=2, optim="adamw_torch"))
    own.train()
    assert max(weight.abs().max() for weight in trained(plain).values()) > RATE / 2
    for name, weight in trained(plain).items():
        torch.testing.assert_close(trained(own)[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("harmonised", [False, True])
def test_the_second_gradient_is_taken_where_the_step_on_the_first_leads(
    learning: ModuleType, sets: dict[str, Dataset], tmp_path: Path, harmonised: bool
) -> None:
    trainer = learning.LearningToUnlearn(meta=True, harmonised=harmonised, alpha=0.5, **options(tmp_path, sets))
    batches: list[Any] = []
    compute_loss = trainer.compute_loss

    def watched(model: Any, inputs: Any, **others: Any) -> Any:
        batches.append(inputs)
        return compute_loss(model, inputs, **others)

    trainer.compute_loss = watched
    model, start = trainer.model, trained(trainer)
    trainer.train()
    end = trained(trainer)
    assert len(batches) == 2
    weights = [p for p in model.parameters() if p.requires_grad]
    tokens = {role: sum((b[role]["labels"][:, 1:] != -100).sum() for b in batches) / 2 for role in ("forget", "retain")}

    def gradients(batch: Any) -> list[torch.Tensor]:
        """Of forgetting and of keeping, each as one vector."""
        found = []
        for role, factor in (("forget", -1.0), ("retain", RETAIN_WEIGHT)):
            own = batch[role]
            out = model(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).logits.log_softmax(-1)
            labels = own["labels"][:, 1:]
            said = out[:, :-1].gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
            loss = -factor * said.sum() / tokens[role]
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
        return found

    def place(vector: torch.Tensor) -> None:
        torch.nn.utils.vector_to_parameters(vector, weights)

    origin = torch.cat([start[n].flatten() for n, p in model.named_parameters() if p.requires_grad])
    place(origin)
    forget, retain = gradients(batches[0])
    whole = forget + retain
    place(origin - 0.5 * RATE * len(whole) ** 0.5 * whole / whole.norm())
    forget_there, retain_there = gradients(batches[1])
    forget, retain = (forget + forget_there) / 2, (retain + retain_there) / 2
    assert forget @ retain < 0
    if harmonised:
        forget, retain = (
            forget - (forget @ retain) / (retain @ retain) * retain,
            retain - (forget @ retain) / (forget @ forget) * forget,
        )
    expected = origin - RATE * (forget + retain)
    found = torch.cat([end[n].flatten() for n, p in model.named_parameters() if p.requires_grad])
    torch.testing.assert_close(found - origin, expected - origin, atol=2e-6, rtol=2e-3)
    assert (forget_there - forget).norm() > 0.01 * forget.norm()


def test_gradients_that_conflict_lose_what_they_have_against_each_other(learning: ModuleType) -> None:
    forget, retain = [torch.tensor([3.0]), torch.tensor([0.0])], [torch.tensor([-1.0]), torch.tensor([1.0])]
    own, other = learning.harmonised(forget, retain)  # along (-1, 1) and along (1, 0)
    assert [part.item() for part in own] == [1.5, 1.5]
    assert [part.item() for part in other] == [0.0, 1.0]


@pytest.mark.parametrize("retain", [[1.0, 2.0], [0.0, 5.0], [0.0, 0.0]])
def test_gradients_that_agree_stay(learning: ModuleType, retain: list[float]) -> None:
    pair = [torch.tensor([2.0, 0.0])], [torch.tensor(retain)]
    assert learning.harmonised(*pair) == pair


@pytest.mark.parametrize(
    ("alpha", "settings", "said"),
    [
        (1.0, {"gradient_accumulation_steps": 1}, "a step needs two micro-batches"),
        (0.0, {}, "needs alpha > 0 and a retain loss, got alpha=0.0"),
        (float("nan"), {}, "needs alpha > 0"),
        (1.0, {"retain_loss": "none"}, "a retain loss"),
    ],
)
def test_a_step_that_cannot_be_made_is_refused(
    learning: ModuleType, sets: dict[str, Dataset], tmp_path: Path, alpha: float, settings: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        learning.LearningToUnlearn(meta=True, harmonised=True, alpha=alpha, **options(tmp_path, sets, **settings))
