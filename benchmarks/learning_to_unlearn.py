"""Learning to unlearn (LTU, https://arxiv.org/abs/2407.10494) against the plain objective, on the testbed.

    python benchmarks/learning_to_unlearn.py [--output_dir outputs/learning_to_unlearn] [--seeds 0 1] [--minutes 30]

A step reads two pairs of a forget and a retain batch that share no row. "Meta" tries a step down the gradient of the
first pair, as long as one of Adam's ("meta-tune"), asks the second pair there ("meta-test"), and updates with the mean
of both gradients, the second one taken where the step was tried ("meta-update", to first order). "Harmonised": where
the gradients of forgetting and of keeping point against each other, each loses what it has along the other. LTU is
both; "plain" reads the same rows in one step. The paper is about image classifiers, and has membership classifiers say
how well they forget; here the forget loss on the second pair does, and batches are drawn at random: what is tried is
the idea, and not the paper's code.

Losses, rates, experts, scores and the attack are those of `depth.py`: NPO with refusals and 8 times the retain loss,
200 steps, here of twice 8 + 8 rows. Runs are appended to `runs.jsonl` and not repeated; `--minutes 0` prints the table.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import depth
import torch
from datasets import disable_progress_bars
from peft import PeftModel
from resumed import Runs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts

# Whether there is a meta split, and whether gradients are harmonised.
KINDS = {"plain": (False, False), "harmonised": (False, True), "meta": (True, False), "LTU": (True, True)}
FORGETTING = {"forget": "forget_weight", "alternative": "alternative_weight", "anchor": "anchor_weight"}
Gradients = list[Tensor]


@dataclass
class LearningArguments:
    """What to run, for how long."""

    output_dir: Path = field(default=Path("outputs/learning_to_unlearn"), metadata={"help": "Where runs go."})
    kinds: list[str] = field(default_factory=lambda: [*KINDS], metadata={"help": "Of training."})
    parts: list[str] = field(
        default_factory=lambda: ["2 of each layer", "one expert"], metadata={"help": "What is trained, as in depth.py."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    alpha: float = field(default=1.0, metadata={"help": "Length of the step that is tried, in steps of Adam's."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this; start again to go on."})


def main() -> None:
    """Run what is not there yet, and print the table."""
    (args,) = HfArgumentParser(LearningArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    if unknown := sorted(set(args.kinds) - set(KINDS)) + sorted(set(args.parts) - set(depth.PARTS)):
        raise ValueError(f"--kinds takes {list(KINDS)} and --parts {list(depth.PARTS)}, got {unknown}")
    runs = Runs(args.output_dir, minutes=args.minutes)
    ground = depth.Ground()
    wanted = (
        {"seed": seed, "part": part, "kind": kind, "alpha": args.alpha if KINDS[kind][0] else 0.0}
        for seed, part, kind in product(args.seeds, args.parts, args.kinds)
    )
    for key in runs.missing(wanted):
        runs.keep(key | unlearn(ground, key["part"], key["kind"], seed=key["seed"], alpha=args.alpha))
    print(table(runs))


class LearningToUnlearn(UnlearningTrainer):
    """Steps of two micro-batches: the first is what a step is tried on, the second says how it went.

    Args:
        meta: Whether the second is asked where the first one's step leads, or at the weights as they are.
        harmonised: Whether forgetting and keeping lose what they have against each other.
        alpha: Length of the step that is tried, in steps of Adam's: each weight moves by the rate in the root mean
            square.
        **options: Of :class:`UnlearningTrainer`.

    Raises:
        ValueError: A step has other than two micro-batches, `alpha` is not positive, or there is no retain loss.
    """

    def __init__(self, *, meta: bool, harmonised: bool, alpha: float, **options: Any) -> None:
        super().__init__(**options)
        if self.args.gradient_accumulation_steps != 2:
            raise ValueError(f"a step needs two micro-batches, got {self.args.gradient_accumulation_steps=}")
        if not alpha > 0 or not self.args.needs_retain:
            raise ValueError(f"learning to unlearn needs alpha > 0 and a retain loss, got {alpha=}")
        self._meta, self._harmonised, self._alpha = meta, harmonised, alpha
        self._tuned: tuple[Gradients, Gradients] | None = None  # of the first micro-batch
        self._start: Gradients = []  # the weights before the step that is tried

    def _record(self, step: Any, batches: Any) -> None:
        self._terms = step.terms
        super()._record(step, batches)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The gradient of the whole step, after its second micro-batch; none is added up by itself."""
        model.train()
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        found = gradients_apart(self.args, self._terms, weights)
        if self._tuned is None:
            self._tuned = found
            if self._meta:
                self._start = [weight.detach().clone() for weight in weights]
                self._try(weights, [a + b for a, b in zip(*found, strict=True)])
            return loss.detach()
        sides = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(self._tuned, found, strict=True)]
        if self._harmonised:
            sides = list(harmonised(*sides))
        with torch.no_grad():
            for weight, start in zip(weights, self._start, strict=False):  # nothing to undo where nothing was tried
                weight.copy_(start)
        for weight, *own in zip(weights, *sides, strict=True):
            weight.grad = sum(own, torch.zeros_like(weight))
        self._tuned, self._start = None, []
        return loss.detach()

    @torch.no_grad()
    def _try(self, weights: Sequence[nn.Parameter], gradient: Gradients) -> None:
        assert self.optimizer is not None
        number = sum(weight.numel() for weight in weights)
        length = self._alpha * self.optimizer.param_groups[0]["lr"] * math.sqrt(number)
        norm = torch.stack([part.norm() for part in gradient]).norm().clamp(min=1e-12)
        for weight, part in zip(weights, gradient, strict=True):
            weight -= length / norm * part


def gradients_apart(
    args: UnlearningConfig, terms: Mapping[str, Tensor], weights: Sequence[nn.Parameter]
) -> tuple[Gradients, Gradients]:
    """Gradients of what is to be forgotten, refusals and anchor with it, and of what is to be kept.

    Args:
        args: Has the weights of the terms.
        terms: Losses of a step by name, with their graph.
        weights: What is trained.
    """
    forgetting = [getattr(args, name) * terms[term] for term, name in FORGETTING.items() if term in terms]
    forget, retain = (
        torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        for loss in (torch.stack(forgetting).sum(), args.retain_weight * terms["retain"])
    )
    return list(forget), list(retain)


def harmonised(forget: Gradients, retain: Gradients) -> tuple[Gradients, Gradients]:
    """Two gradients of which neither points against the other.

    Args:
        forget: One tensor a weight.
        retain: Likewise.

    Returns:
        Both as they are where their product is not negative; else each without its part along the other, as it was.
    """
    product = sum((a * b).sum() for a, b in zip(forget, retain, strict=True))
    if not product < 0:
        return forget, retain
    return _without(forget, retain, product), _without(retain, forget, product)


def _without(own: Gradients, other: Gradients, product: Any) -> Gradients:
    share = product / sum((part * part).sum() for part in other)
    return [a - share * b for a, b in zip(own, other, strict=True)]


def unlearn(ground: depth.Ground, part: str, kind: str, *, seed: int, alpha: float) -> dict[str, Any]:
    """Scores before and after the relearning attack, and the seconds of the CPU that training took."""
    set_seed(seed)
    base = depth.load("base")
    choose, rate = depth.PARTS[part]
    adapter = None
    if choose:
        found = attribute_experts(
            base,
            ground.forget,
            processing_class=ground.tokenizer,
            score="contrast",
            retain_dataset=ground.retain,
            batch_size=50,
            show_progress=False,
        )
        adapter = UOEConfig(target_experts=choose(found))
    meta, harmonise = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        arguments = depth.training_arguments(folder, loss=depth.DEMO, rate=rate, seed=seed)
        trainer = LearningToUnlearn(
            meta=meta,
            harmonised=harmonise,
            alpha=alpha,
            model=base,
            args=replace(arguments, gradient_accumulation_steps=2),
            train_dataset=ground.forget,
            retain_dataset=ground.retain,
            processing_class=ground.tokenizer,
            peft_config=adapter,
        )
        started = time.process_time()
        trainer.train()
        seconds = round(time.process_time() - started, 1)
        trainer.save_model(folder)
        # From disk: a copy of a model that was trained would go on calling the original.
        model = (
            PeftModel.from_pretrained(depth.load("base"), folder).eval()
            if adapter
            else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        )
        return {"seconds": seconds, **ground._scores(model)}


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, as Markdown."""
    names = ("forget_rouge_l_recall", "retain_rouge_l_recall", "relearned")
    lines = ["| trained | kind | alpha | forget | retain | relearned | CPU s | seeds |", "|---" * 8 + "|"]
    for key in dict.fromkeys((run["part"], run["kind"], run["alpha"]) for run in runs):
        rows = [run for run in runs if (run["part"], run["kind"], run["alpha"]) == key]
        means = " | ".join(f"{fmean(row[name] for row in rows):.3f}" for name in names)
        seconds = fmean(row["seconds"] for row in rows)
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:g} | {means} | {seconds:.0f} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
