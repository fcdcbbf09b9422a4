"""Other ways to unlearn request after request: full training, SSU and orthogonal LoRA, on the same rows."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from requests_ground import Ground, Row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from uoe_peft.data import Batch, collate, tokenize_dataset
from uoe_peft.requests import RequestTrainer

PENALTY = 0.1  # of the overlap of successive A matrices
KEPT_SHARE = 0.97  # of the retain rows' probability, in each request
STRENGTHS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)


def in_full(ground: Ground, seed: int, done: Container[str]) -> Iterator[Row]:
    """All parameters, each request on top of the last, earlier rows with refusals, interpolated as far as asked."""
    folder = ground.output_dir / f"full_{seed}"
    for place, topic in enumerate(ground.names):
        if topic in done and (folder / topic).is_dir():
            continue
        model = _loaded(folder / ground.names[place - 1]) if place else ground.load()
        kept = ground.kept(after=place, earlier=ground.names[:place])
        rate = ground.recipe.full_learning_rate
        found = ground.train(model, ground.requests[topic], kept, seed=seed, learning_rate=rate)
        model.save_pretrained(folder / topic)
        yield ground.report(topic, _loaded(folder / topic), **found)  # what was trained calls the old


class OrthogonalTrainer(RequestTrainer):
    """Adds `PENALTY · Σ |A_new A_earlierᵀ|²` over all LoRA layers, as O3 does (https://arxiv.org/abs/2407.10223)."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in `RequestTrainer`, with the penalty."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        own: dict[str, list[Tensor]] = {"new": [], "earlier": []}
        for module in cast(nn.Module, self.model).modules():
            factors = cast(Mapping[str, nn.Linear], getattr(module, "lora_A", {}))
            if len(factors) > 1:
                *earlier, new = (linear.weight for linear in factors.values())  # in the order of requests
                own["new"].append(new)
                own["earlier"].append(torch.cat(earlier))
        overlaps = [(a @ b.T).square().sum() for a, b in zip(own["new"], own["earlier"], strict=True)]
        return loss + PENALTY * torch.stack(overlaps).sum() if overlaps and "forget" in inputs else loss


def orthogonal_lora(ground: Ground, seed: int, done: Container[str]) -> Iterator[Row]:
    """LoRA of rank 8 for each request, its A matrices kept orthogonal to those of earlier requests; then one off.

    O3's own losses, and its detector, which is a gate, are left out: losses are those of all other rows.
    """
    gone = ground.names[1]
    if f"{gone} withdrawn" in done:
        return
    model = ground.load()
    for place in range(len(ground.names)):
        model, found = lora_request(ground, model, place, seed=seed, rate=ground.recipe.lora_learning_rate)
        yield ground.report(ground.names[place], model, **found)
    model.base_model.set_adapter([name for name in ground.names if name != gone])
    yield ground.report(f"{gone} withdrawn", model)


def lora_request(ground: Ground, model: Any, place: int, *, seed: int, rate: float) -> tuple[Any, Row]:
    """The model with the LoRA of a further request, and what training says of itself."""
    *earlier, topic = ground.names[: place + 1]
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if isinstance(model, PeftModel):
        model.add_adapter(topic, config)
    else:
        model = get_peft_model(model, config, adapter_name=topic)
    model.base_model.set_adapter([*earlier, topic])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{topic}." in name)
    options: dict[str, Any] = {"learning_rate": rate, "calibrate": False, "trainer_class": OrthogonalTrainer}
    kept = ground.kept(after=place, earlier=earlier)
    return model, ground.train(model, ground.requests[topic], kept, seed=seed, **options)


def ssu(ground: Ground, seed: int, done: Container[str]) -> Iterator[Row]:
    """SSU (https://arxiv.org/abs/2406.10952): learn a request under a saliency mask, and subtract what was learned.

    Its loss is `CE(answers) + CE(random answers)`; only weights train whose gradient of it at the start is larger than
    the mean by a standard deviation. It has no retain set: the strength of the subtraction is the greatest of
    `STRENGTHS` that keeps `KEPT_SHARE` of the rows that choose.
    """
    if ground.names[-1] in done:
        return
    model = ground.load()
    keeps = _probability(ground, model)
    for topic, rows in ground.requests.items():
        keeps *= KEPT_SHARE
        found = ssu_request(ground, model, rows, seed=seed, rate=ground.recipe.ssu_learning_rate, keeps=keeps)
        yield ground.report(topic, model, **found)


def ssu_request(
    ground: Ground, model: Any, rows: Dataset, *, seed: int, rate: float, keeps: float | None = None
) -> Row:
    """Forget rows in place, as far as the probability of what is kept allows; None: `KEPT_SHARE` of what it is."""
    keeps = keeps or KEPT_SHARE * _probability(ground, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _learn(ground, model, rows, seed=seed, rate=rate)
    learned = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for strength in (*STRENGTHS, 0.0):
        for name, parameter in model.named_parameters():
            parameter.data = before[name] - strength * learned[name]
        if _probability(ground, model) >= keeps:
            break
    return {"strength": strength}


def _learn(ground: Ground, model: Any, rows: Dataset, *, seed: int, rate: float) -> None:
    """Fine-tune on a request by SSU's loss, masked."""
    generator = torch.Generator().manual_seed(seed)
    examples = list(tokenize_dataset(rows, ground.tokenizer, max_length=None))
    model.train()
    for batch in _batches(examples, 50):
        _ssu_loss(model, batch, generator).backward()
    masks = {}
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs()
        masks[name] = size > size.mean() + size.std()
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(ground.recipe.steps):
        drawn = torch.randint(len(examples), (8,), generator=generator).tolist()
        _ssu_loss(model, collate([examples[i] for i in drawn], pad_token_id=0), generator).backward()
        for name, parameter in model.named_parameters():
            parameter.grad *= masks[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _ssu_loss(model: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    wrong = torch.randint(logits.shape[-1], (int(counted.sum()),), generator=generator)
    return cross_entropy(logits[counted], labels[counted]) + cross_entropy(logits[counted], wrong)


@torch.no_grad()
def _probability(ground: Ground, model: Any) -> float:
    """Mean over answers of the geometric mean of their tokens' probabilities, on the rows that choose."""
    total, rows = 0.0, list(tokenize_dataset(ground.chosen_on, ground.tokenizer, max_length=None))
    for batch in _batches(rows, 40):
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        lengths = (batch["labels"][:, 1:] != -100).sum(dim=1)
        total += sum(math.exp(-value) for value in (losses.sum(dim=1) / lengths).tolist())
    return total / len(rows)


def _batches(examples: list[Any], size: int) -> Iterator[Batch]:
    return (collate(examples[i : i + size], pad_token_id=0) for i in range(0, len(examples), size))


def _loaded(folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
