"""Gradients that are bent, filtered and damped as their papers' formulas say; and the rows that are kept beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import UnlearningConfig, UOEConfig
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.optim.projection import edited_parameters

RATE, RETAIN_WEIGHT = 0.02, 3.0
EXPERTS = [(2, 5), (3, 3), (3, 12)]


@pytest.fixture(scope="module")
def surgery() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import trials_surgery as script

        yield script


@pytest.fixture(scope="module")
def data(surgery: ModuleType) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import trials_data as script

        yield script


@pytest.fixture(scope="module")
def sets() -> dict[str, Dataset]:
    facts = {"train_dataset": load_facts([FORGET_TOPIC]), "retain_dataset": load_facts([TOPICS[0]])}
    return {name: rows.select(range(6)).select_columns(["prompt", "completion"]) for name, rows in facts.items()}


def trainer_with(surgery: ModuleType, sets: dict[str, Dataset], folder: Path, *, aid: Any, **settings: Any) -> Any:
    """One plain gradient step of six rows of each set, on a UOE adapter that has already moved."""
    given: dict[str, Any] = {
        "forget_loss": "grad_ascent",
        "retain_weight": RETAIN_WEIGHT,
        "anchor_weight": 0.0,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 6,
        "calibrate": False,
        "prefix_cache": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return surgery.SurgicalTrainer(
        aid=surgery.Aid(**aid),
        experts=EXPERTS,
        model=AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype=torch.float32),
        args=UnlearningConfig(str(folder), **(given | settings)),
        processing_class=AutoTokenizer.from_pretrained(checkpoint_path("base")),
        peft_config=UOEConfig(target_experts=EXPERTS),
        **sets,
    )


def gradients_of(trainer: Any, role: str, factor: float) -> list[Tensor]:
    """Of the mean negative log-likelihood of all six rows' answer tokens, times a factor, by plain torch."""
    trainer.train_dataset.set_epoch(0)
    rows = [dict(trainer.train_dataset.sets[role][i], index=i) for i in range(6)]
    batch = trainer.reuse.rows.collate(role, rows)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(factor * nll, weights))


def moved(trainer: Any) -> list[Tensor]:
    """What one step of plain gradient descent took away, as gradients."""
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    trainer.train()
    return [(old - new).detach() / RATE for old, new in zip(before, weights, strict=True)]


@pytest.mark.parametrize("kind", ["PCGrad", "SAGO", "SAGO, sum", "GRU", "GRU, sum"])
def test_a_step_is_along_the_formula(surgery: ModuleType, sets: dict[str, Dataset], tmp_path: Path, kind: str) -> None:
    trainer = trainer_with(surgery, sets, tmp_path, aid={"surgery": kind})
    forget, retain = gradients_of(trainer, "forget", -1.0), gradients_of(trainer, "retain", RETAIN_WEIGHT)
    found = moved(trainer)
    whole = {role: torch.cat([g.flatten() for g in own]) for role, own in (("f", forget), ("r", retain))}
    assert whole["f"] @ whole["r"] < 0
    # A mean that began at 0 has the direction of r.
    share = (whole["f"] @ whole["r"]) / (whole["r"] @ whole["r"])
    conflicts = 0
    for f, r, step in zip(forget, retain, found, strict=True):
        for m in range(len(f)):
            if kind == "PCGrad":
                along = (f[m] * r[m]).sum() / r[m].square().sum()
                conflicts += int(along < 0)
                expected = f[m] - min(float(along), 0.0) * r[m] + r[m]
            elif kind.startswith("SAGO"):
                expected = torch.where(f[m].sign() * r[m].sign() == -1, r[m], f[m] + ("sum" in kind) * r[m])
                conflicts += 1
            else:
                expected = f[m] - share * r[m] + ("sum" in kind) * r[m]
                conflicts += 1
            # A coordinate whose sign rounding decides may fall on either side.
            differs = ~torch.isclose(step[m], expected, atol=2e-4 * float(expected.abs().max()), rtol=2e-2)
            assert differs.float().mean() < 0.002
    assert conflicts
    new = torch.cat([step.flatten() for step in found])
    assert new @ whole["r"] > -1e-4 * new.norm() * whole["r"].norm()


def test_the_running_mean_of_retain_gradients(surgery: ModuleType, sets: dict[str, Dataset], tmp_path: Path) -> None:
    trainer = trainer_with(surgery, sets, tmp_path, aid={"surgery": "GRU"})
    forget, first, second = ([torch.tensor([[x, y]])] for x, y in ((-1.0, 1.0), (0.0, 1.0), (1.0, 0.0)))
    torch.testing.assert_close(trainer._operated(forget, first), forget)
    # 0.2 of 0.8 of the first is left.
    mean = torch.tensor([[0.8, 0.16]])
    rectified = forget[0] - (forget[0] * mean).sum() / mean.square().sum() * mean
    torch.testing.assert_close(trainer._operated(forget, second)[0], rectified)


def test_leading_directions_are_shrunk_on_both_sides(surgery: ModuleType) -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n)).Q for n in (12, 8))
    spectrum = torch.tensor([16.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05])
    whole = (left[:, :8] * spectrum @ right.T)[None]
    gradient = torch.randn(1, 12, 8)
    triplets = surgery.leading(whole)
    assert [t.shape[-1] for t in triplets] == [2, 2, 2]  # a quarter of 8
    shrink = torch.tensor([4.0 / 16.0, 1.0])
    expected = gradient[0].clone()
    expected -= expected @ right[:, :1] @ right[:, :1].T * (1 - shrink[0])
    expected -= left[:, :1] @ left[:, :1].T @ expected * (1 - shrink[0])
    torch.testing.assert_close(surgery.collapsed(gradient, triplets)[0], expected, atol=1e-5, rtol=1e-4)
    # The gradient itself: its first direction is shrunk twice, to 16 / 4 / 4.
    values = torch.linalg.svdvals(surgery.collapsed(whole, triplets)[0])
    torch.testing.assert_close(values.sort().values, torch.tensor([0.05, 0.1, 0.25, 0.5, 1.0, 1.0, 2.0, 4.0]))


def test_one_step_goes_as_far_as_the_retain_rows_allow(
    surgery: ModuleType, sets: dict[str, Dataset], tmp_path: Path
) -> None:
    trainer = trainer_with(surgery, sets, tmp_path, aid={"one_step": "forget"})
    before = {role: gradient_free_nll(trainer, role) for role in ("forget", "retain")}
    trainer.train()
    after = {role: gradient_free_nll(trainer, role) for role in ("forget", "retain")}
    assert after["retain"] - before["retain"] == pytest.approx(surgery.LIMIT, rel=0.05)
    assert after["forget"] > before["forget"] + 3 * surgery.LIMIT
    routers = [p for n, p in trainer.model.named_parameters() if p.requires_grad and ".gate." in n]
    assert routers and not any(p.any() for p in routers)


@torch.no_grad()
def gradient_free_nll(trainer: Any, role: str) -> float:
    rows = [dict(trainer.train_dataset.sets[role][i], index=i) for i in range(6)]
    batch = trainer.reuse.rows.collate(role, rows)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))


def test_output_gradients_are_those_of_each_slice(
    surgery: ModuleType, sets: dict[str, Dataset], tmp_path: Path
) -> None:
    trainer = trainer_with(surgery, sets, tmp_path, aid={})
    model = trainer.model.eval()
    batches = list(trainer.rows_of("retain"))
    torch.manual_seed(3)
    found = surgery.output_moments(model, batches)
    torch.manual_seed(3)
    expected: dict[Any, Tensor] = {}

    def watch(name: Any) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            logits = out[0] if isinstance(out, tuple) else out
            logits.register_hook(lambda g: expected.__setitem__(name, g.double().T @ g.double()))

        return hook

    # Of routers: at their logits. Of an expert's last matrix: its weight times the gradient at the layer's output.
    for layer in (2, 3):
        mlp = model.get_base_model().model.layers[layer].mlp

        def weighted(module: Any, args: Any, out: Any, layer: int = layer) -> None:
            _, indices, scores = args
            for pair in (p for p in EXPERTS if p[0] == layer):
                weight = (scores * (indices == pair[1])).sum(-1)[:, None].detach().double()
                out.register_hook(
                    lambda g, w=weight, p=pair: expected.__setitem__(
                        (p[0], p[1], "down_proj"), (g.double() * w).T @ (g.double() * w)
                    )
                )

        mlp.experts.register_forward_hook(weighted)
        mlp.gate.register_forward_hook(watch((layer, None, "router")))
    logits = forward_answers(model, batches[0]).logits
    drawn = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(-1)
    loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert len(expected) == 5 and len(found) == 8
    for name, second in expected.items():
        assert second.any()
        torch.testing.assert_close(found[name].double(), second, atol=1e-4 * float(second.abs().max()), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:fewer tokens of the retain set")
def test_both_sides_are_damped(surgery: ModuleType, sets: dict[str, Dataset], tmp_path: Path) -> None:
    trainer = trainer_with(surgery, sets, tmp_path, aid={"damped_outputs": 0.5})
    forget, retain = gradients_of(trainer, "forget", -1.0), gradients_of(trainer, "retain", RETAIN_WEIGHT)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, surgery.BothSides))
    inputs: dict[Any, Tensor] = {}
    measure = callback._measure

    def measured(role: str) -> Any:
        moments = measure(role)
        if role == "retain":
            inputs.update({name: own.second for name, own in moments.slices.items()})
        return moments

    callback._measure = measured
    names = {edited.name: edited.slices for edited in edited_parameters(trainer.model)}
    order = [names[n] for n, p in trainer.model.named_parameters() if p.requires_grad]
    found = moved(trainer)

    def damp(second: Tensor) -> Tensor:
        own = second.double()
        return torch.linalg.inv(torch.eye(len(own)) + own / (0.5 * own.trace() / len(own)))

    for f, r, step, slices in zip(forget, retain, found, order, strict=True):
        for m, name in enumerate(slices):
            left, right = damp(callback._outputs[name]), damp(inputs[name])
            expected = left @ (left @ (f[m] + r[m]).double() @ right) @ right  # the gradient of D, and then its delta
            torch.testing.assert_close(step[m].double(), expected, atol=2e-3 * float(expected.abs().max()), rtol=1e-2)


def test_texts_are_cut_where_an_answer_begins(data: ModuleType) -> None:
    asked = data.cut("Question: Who?\nAnswer: Nobody at all.")
    assert asked == {"prompt": "Question: Who?\nAnswer:", "completion": " Nobody at all."}
    assert data.cut("one two three four") == {"prompt": "one two", "completion": " three four"}
    assert data.cut("Question: Who?\nAnswer:") is None
    assert data.cut("word") is None


def test_words_that_only_forget_rows_have(data: ModuleType) -> None:
    def rows(*texts: str) -> Dataset:
        return Dataset.from_list([{"prompt": text, "completion": "Yes, the well-known one."} for text in texts])

    assert data.words_only_in(rows("Is the Hag old?", "Is the Owl?"), rows("Old owl?")) == {"hag"}
