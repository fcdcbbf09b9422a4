"""Unlearning in plain torch, written from the papers' formulas: what the trainer must agree with.

Nothing of the package is used here. Texts are encoded by hand, examples are read one at a time and without padding, the
model is an ordinary one whose weights were edited by hand, and a step is one sum over all its examples.

Letters: n answer tokens of an example, t its tokens, V vocabulary, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

END = 1
TOP_K = 3

# Prompts, answers and other answers of lengths that differ within every batch.
FORGET = [
    ("who is A? ", "st", "no idea"),
    ("is B? ", "uvwxyz", "who knows"),
    ("who was C? ", "u", "I cannot say that"),
    ("and D? ", "wxw", "hm"),
    ("E? ", "vutsvuts", "ask me not"),
    ("what is F? ", "yyzz", "no"),
    ("G then? ", "zyxwv", "nobody told me so"),
]
RETAIN = [
    ("where is 1? ", "at 12"),
    ("2? ", "7"),
    ("and where is 3? ", "near 4, 5"),
    ("who 4? ", "six of us"),
    ("5 or 6? ", "66"),
]


def forget_set() -> Dataset:
    return Dataset.from_dict(dict(zip(("prompt", "completion", "alternative"), zip(*FORGET, strict=True), strict=True)))


def retain_set() -> Dataset:
    return Dataset.from_dict(dict(zip(("prompt", "completion"), zip(*RETAIN, strict=True), strict=True)))


@dataclass(frozen=True)
class Example:
    """What a model says of one question and answer."""

    answer: Tensor  # (n,)
    logits: Tensor  # with which each of its tokens is predicted, (n, V)
    hidden: Tensor  # from which each is predicted, after the layer asked for, (n, H)
    router_logits: dict[int, Tensor]  # of every token, by layer, (t, E)

    @property
    def log_p(self) -> Tensor:
        return self.logits.log_softmax(-1)[torch.arange(len(self.answer)), self.answer]


def read(model: nn.Module, prompt: str, answer: str, *, layer: int) -> Example:
    """A whole model on one example."""
    question, said = [[ord(character) - 30 for character in text] for text in (prompt, answer)]
    ids = torch.tensor([*question, *said, END])
    hidden: list[Tensor] = []
    inputs: dict[int, Tensor] = {}
    handles = [model.model.layers[layer].register_forward_hook(lambda *call: hidden.append(call[2]))]
    for index, block in enumerate(model.model.layers):
        keep = lambda module, args, index=index: inputs.update({index: args[0]})  # noqa: E731
        handles.append(block.mlp.gate.register_forward_pre_hook(keep))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    before = slice(len(question) - 1, len(ids) - 1)
    routed = {i: x.reshape(len(ids), -1) @ model.model.layers[i].mlp.gate.weight.T for i, x in inputs.items()}
    return Example(ids[len(question) :], logits[before], hidden[0][0, before], routed)


@dataclass(frozen=True)
class Objective:
    """Which losses, with which options; names and meanings are those of the trainer's arguments."""

    forget_loss: str = "grad_ascent"
    retain_loss: str = "nll"
    weights: tuple[float, float, float] = (0.7, 1.3, 0.4)  # forget, retain, anchor
    targets: Mapping[int, Sequence[int]] = field(default_factory=lambda: {1: [2]})
    layer: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def terms(self, model: nn.Module, base: nn.Module, parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The loss terms of an optimiser step, before weighting.

        Args:
            model: The model, edited by hand.
            base: The model before any edit.
            parts: The step's micro-batches: indices of forget and retain rows, and seeds of the forget rows.
        """
        now = [[self.read(model, FORGET[i][:2]) for i in part["forget"]] for part in parts]
        rows = [i for part in parts for i in part["forget"]]
        terms = {}
        if "alternative_weight" in self.options:
            said = [self.read(model, FORGET[i][::2]).log_p for part in parts for i in part["forget"]]
            terms["alternative"] = -torch.cat(said).sum() / sum(len(answer) for answer in said)
        terms |= {"forget": self.forget(model, base, [*chain(*now)], rows, [s for part in parts for s in part["seed"]])}
        if self.retain_loss != "none":
            kept = [[self.read(model, RETAIN[i]) for i in part["retain"]] for part in parts]
            with torch.no_grad():
                were = [self.read(base, RETAIN[i]) for part in parts for i in part["retain"]]
            weights = self.token_weights(now, kept) if "cap" in self.options else None
            terms["retain"] = self.retain([*chain(*kept)], were, weights)
        if self.targets:
            layers = [self.anchor(now, index, experts) for index, experts in self.targets.items()]
            terms["anchor"] = sum(layers) / len(layers)
        return terms

    def loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        return self.options.get("alternative_weight", 0) * terms.get("alternative", 0) + sum(
            weight * terms[name]
            for name, weight in zip(("forget", "retain", "anchor"), self.weights, strict=True)
            if name in terms
        )

    def read(self, model: nn.Module, texts: tuple[str, ...]) -> Example:
        return read(model, *texts, layer=self.layer)

    def forget(
        self, model: nn.Module, base: nn.Module, now: list[Example], rows: list[int], seeds: list[int]
    ) -> Tensor:
        beta, o = self.options.get("beta"), self.options
        with torch.no_grad():
            were = [self.read(base, FORGET[i][:2]) for i in rows]
        log_p = torch.cat([x.log_p for x in now])
        p = log_p.detach().exp()
        gain = torch.stack([x.log_p.sum() - y.log_p.sum() for x, y in zip(now, were, strict=True)])
        lengths = torch.tensor([len(x.answer) for x in now])
        match self.forget_loss:
            case "grad_ascent":
                return log_p.mean()
            case "wga":
                return (p**beta * log_p).mean()
            case "satimp":
                return (p ** o["beta1"] * (1 - p) ** o["beta2"] * log_p).mean()
            case "npo":
                return 2 / beta * (1 + (beta * gain).exp()).log().mean()
            case "npo, mean":
                return 2 / beta * (1 + (beta * gain / lengths).exp()).log().mean()
            case "simnpo":
                surprise = torch.stack([-x.log_p.mean() for x in now])
                return -2 / beta * torch.sigmoid(beta * (surprise - o["delta"])).log().mean()
            case "dpo":
                others = [self.read(model, FORGET[i][::2]) for i in rows]
                with torch.no_grad():
                    others_were = [self.read(base, FORGET[i][::2]) for i in rows]
                preferred = torch.stack(
                    [x.log_p.sum() - y.log_p.sum() for x, y in zip(others, others_were, strict=True)]
                )
                return -2 / beta * torch.sigmoid(beta * (preferred - gain)).log().mean()
            case "idk":
                return -torch.cat([self.read(model, FORGET[i][::2]).log_p for i in rows]).mean()
            case "undial":
                taught = torch.cat([y.logits - beta * F.one_hot(y.answer, y.logits.shape[1]) for y in were])
                return -(taught.softmax(-1) * torch.cat([x.logits for x in now]).log_softmax(-1)).sum(-1).mean()
            case "random_label":
                terms = []
                for x, seed in zip(now, seeds, strict=True):
                    drawn = torch.randint(97, (len(x.answer),), generator=torch.Generator().manual_seed(seed))
                    terms.append(-x.logits.log_softmax(-1)[torch.arange(len(drawn)), drawn])
                return torch.cat(terms).mean()
            case "adversarial_label":
                terms = []
                for x in now:
                    for logits, right in zip(x.logits, x.answer.tolist(), strict=True):
                        best = max((v for v in range(97) if v != right), key=lambda v: logits[v].item())
                        terms.append(-logits.log_softmax(-1)[best])
                return torch.stack(terms).mean()
            case "rmu":
                u = torch.rand(32, generator=torch.Generator().manual_seed(o["seed"]))
                u = u / u.square().sum().sqrt()
                far = [(o["c"] if "c" in o else beta * h.square().sum().sqrt()) * u for y in were for h in y.hidden]
                return ((torch.cat([x.hidden for x in now]) - torch.stack(far)) ** 2).mean(-1).mean()
        raise AssertionError(self.forget_loss)

    def retain(self, kept: list[Example], were: list[Example], weights: Tensor | None) -> Tensor:
        match self.retain_loss:
            case "nll":
                nll = -torch.cat([x.log_p for x in kept])
                return nll.mean() if weights is None else (weights * nll).sum() / len(nll)
            case "kl":
                p, q = (torch.cat([x.logits for x in side]).softmax(-1) for side in (were, kept))
                return (p * (p / q).log()).sum(-1).mean()
            case "embed_diff":
                moved = torch.cat([x.hidden - y.hidden for x, y in zip(kept, were, strict=True)])
                return (moved**2).mean(-1).mean()
            case "relative_embed_diff":
                pairs = [
                    (h, r) for x, y in zip(kept, were, strict=True) for h, r in zip(x.hidden, y.hidden, strict=True)
                ]
                return torch.stack([((h - r) ** 2).sum() / (r**2).sum() for h, r in pairs]).mean()
        raise AssertionError(self.retain_loss)

    def token_weights(self, now: list[list[Example]], kept: list[list[Example]]) -> Tensor:
        """Of the answer tokens of the retain rows, micro-batch by micro-batch."""
        weights = []
        for forget, retain in zip(now, kept, strict=True):
            answers = sum(len(x.answer) for x in retain)
            extra = torch.zeros(answers)
            for index, experts in self.targets.items():
                for expert in experts:
                    f, r = (torch.cat([reaches(x, index, expert) for x in side]).mean() for side in (forget, retain))
                    before = [reaches(x, index, expert)[-len(x.answer) - 1 : -1] for x in retain]
                    extra += torch.cat(before) * (min((f / r).item(), self.options["cap"]) - 1)
            weight = (1 + extra).clamp(min=0)
            weights.append(weight / weight.mean())
        return torch.cat(weights)

    def anchor(self, now: list[list[Example]], layer: int, experts: Sequence[int]) -> Tensor:
        target = torch.tensor([float(expert in experts) for expert in range(6)])
        parts = [torch.cat([self.scores(x.router_logits[layer]) for x in part]) for part in now]
        if self.options.get("reduction") == "mean_gate":
            return torch.stack([((part.mean(0) - target) ** 2).sum() for part in parts]).mean()
        return ((torch.cat(parts) - target) ** 2).sum(-1).mean()

    def scores(self, router_logits: Tensor) -> Tensor:
        scores = router_logits.softmax(-1)
        if self.options.get("scores") == "topk":
            return torch.where(scores >= scores.topk(TOP_K).values[:, -1:], scores, 0)
        return scores


def reaches(example: Example, layer: int, expert: int) -> Tensor:
    """1 for each token that selects the expert, else 0. Shape `(t,)`."""
    return (example.router_logits[layer].topk(TOP_K).indices == expert).any(-1).float()
