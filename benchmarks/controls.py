"""Leaving experts out, without any training: what a table of unlearning should be compared with.

    python benchmarks/controls.py [--output_dir outputs/controls] [--linked outputs/linked/0]

Of the base model, nothing is changed but which experts speak. "Zero": the experts contribute nothing, the others keep
their weights. "Route around": they cannot be selected, so that the next best take their place, with a softmax over the
rest. "Skip": expert skipping (https://arxiv.org/abs/2402.14800), where a token's second expert is left out if its
weight is below beta times the first's, beta the median of this ratio over the retain rows of training, layer by layer;
here for the named experts alone, and "skip any" for all, as published. Experts are named by `contrast` and `gate`, or
drawn.

The testbed: ROUGE-L recall of 150 forget and 300 retain rows, those of `depth.py`. With `--linked`, the folder of a
seed that `linked.py` has made: ROUGE-L by distance in its graph, for each request. Runs are appended to `runs.jsonl`
and not repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, get_args

import depth
import torch
from datasets import Dataset, disable_progress_bars
from linked import GROUPS, LinkedGround, as_set, in_training
from linked_facts import Request
from resumed import Runs
from torch import Tensor, nn
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from uoe_peft import attribute_experts, find_moe_blocks
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.moe.interventions import silence_expert
from uoe_peft.moe.routing import record_routing

Pairs = Sequence[tuple[int, int]]
CONTROLS = ("zero", "route around", "skip")
# How the experts are chosen: by which score, how many, and from where.
CHOICES: dict[str, tuple[str, int, str]] = {
    "gate's": ("gate", 1, "all_layers"),
    "contrast's": ("contrast", 1, "all_layers"),
    "2 of each layer": ("contrast", 2, "each_layer"),
    "4 of each layer": ("contrast", 4, "each_layer"),
    "random": ("random", 1, "all_layers"),
    "random, 2 of each layer": ("random", 2, "each_layer"),
}


@dataclass
class ControlsArguments:
    """On what."""

    output_dir: Path = field(default=Path("outputs/controls"), metadata={"help": "Where runs go."})
    linked: Path | None = field(default=None, metadata={"help": "A seed's folder of linked.py; None: the testbed."})
    choices: list[str] = field(default_factory=lambda: [*CHOICES], metadata={"help": "How experts are chosen."})


@dataclass(frozen=True)
class Asked:
    """A base model with what is to be forgotten, and how it is asked.

    Attributes:
        name: Of the ground and the request.
        model: The base.
        tokenizer: Its tokenizer.
        forget: What attribution reads.
        retain: Likewise; beta is measured on it.
        score: Means by set.
    """

    name: str
    model: Any
    tokenizer: Any
    forget: Dataset
    retain: Dataset
    score: Any


def main() -> None:
    """Run what is not there yet, and print the tables."""
    (args,) = HfArgumentParser(ControlsArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs = Runs(args.output_dir)
    wanted = [("base", "none"), ("any", "skip"), *product(args.choices, CONTROLS)]
    for asked in [testbed()] if args.linked is None else linked(args.linked):
        betas = median_ratios(asked)
        keys = ({"ground": asked.name, "experts": choice, "control": control} for choice, control in wanted)
        for key in runs.missing(keys):
            choice, control = key["experts"], key["control"]
            pairs = [] if choice == "base" else None if choice == "any" else chosen(asked, choice)
            with controlled(asked.model, pairs, control, betas=betas):
                runs.keep({**key, "pairs": pairs, "scores": dict(asked.score(asked.model))})
    print("\n\n".join(tables(runs)))


def testbed() -> Asked:
    """The shipped model and topic."""
    ground = depth.Ground()
    return Asked("testbed", depth.load("base"), ground.tokenizer, ground.forget, ground.retain, ground.score)


def linked(folder: Path) -> Iterator[Asked]:
    """Each request of a linked ground.

    Raises:
        ValueError: The folder is none that `linked.py` has made.
    """
    if not (folder / "base" / "model.safetensors").is_file():
        raise ValueError(f"--linked must be a seed's folder of linked.py, with base/model.safetensors; got {folder}")
    ground = LinkedGround(folder, seed=int(folder.name), epochs=0)
    for request in get_args(Request):
        forget, kept = ground.split(request)
        read = [row for row in kept if in_training(row)]
        yield Asked(
            f"{request}, seed {folder.name}",
            ground.load(None),
            ground.tokenizer,
            as_set(forget),
            as_set(read),
            lambda model, request=request: ground.scores(model, request),
        )


def chosen(asked: Asked, choice: str) -> list[tuple[int, int]]:
    """The experts of one of `CHOICES`."""
    score, number, strategy = CHOICES[choice]
    found = attribute_experts(
        asked.model,
        asked.forget,
        processing_class=asked.tokenizer,
        score=score,  # type: ignore[arg-type]
        retain_dataset=asked.retain,
        batch_size=50,
        seed=0,
        show_progress=False,
    )
    return found.top(number, strategy=strategy)  # type: ignore[arg-type]


@torch.no_grad()
def median_ratios(asked: Asked) -> dict[int, float]:
    """Of each layer the median, over the tokens of the retain rows, of the second weight over the first."""
    examples: list[Any] = list(tokenize_dataset(asked.retain, asked.tokenizer, max_length=None))
    ratios: dict[int, list[Tensor]] = {}
    for start in range(0, len(examples), 50):
        batch = collate(examples[start : start + 50], pad_token_id=asked.tokenizer.pad_token_id)
        with record_routing(asked.model) as trace:
            asked.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for layer_idx in trace:
                weights = trace[layer_idx].top_k_weights[batch["attention_mask"].flatten().bool()]
                ratios.setdefault(layer_idx, []).append(weights[:, 1] / weights[:, 0])
    return {layer_idx: torch.cat(own).median().item() for layer_idx, own in ratios.items()}


@contextmanager
def controlled(model: Any, pairs: Pairs | None, control: str, *, betas: Mapping[int, float]) -> Iterator[None]:
    """Inside the context some experts are left out.

    Args:
        model: A model with softmax routers that select two experts or more.
        pairs: The experts; None: any, which only "skip" takes.
        control: One of `CONTROLS`, or "none".
        betas: Of "skip", by layer.

    Raises:
        ValueError: The control is unknown, or cannot take any expert.
    """
    if control not in (*CONTROLS, "none") or (pairs is None and control != "skip"):
        raise ValueError(f"there is no control {control!r} of {'any expert' if pairs is None else pairs}")
    with ExitStack() as stack:
        for block in find_moe_blocks(model):
            own = [expert for layer_idx, expert in pairs if layer_idx == block.layer_idx] if pairs is not None else None
            if own == [] or control == "none":
                continue
            match control:
                case "zero":
                    for expert in own or ():
                        stack.enter_context(silence_expert(block, expert))
                case "route around":
                    stack.callback(block.router.register_forward_hook(around(own or [])).remove)
                case _:
                    stack.callback(block.router.register_forward_hook(skipping(own, betas[block.layer_idx])).remove)
        yield


def around(experts: list[int]) -> Any:
    """A hook of a softmax router that selects among all other experts."""

    def select(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = output
        masked = logits.index_fill(-1, torch.tensor(experts), float("-inf"))
        values, selected = masked.softmax(-1, dtype=torch.float32).topk(index.shape[-1], dim=-1)
        if router.norm_topk_prob:
            values = values / values.sum(-1, keepdim=True)
        return masked, values.to(weights.dtype), selected

    return select


def skipping(experts: list[int] | None, beta: float) -> Any:
    """A hook that takes the weight of a token's second expert away if it is below beta times the first's."""

    def skip(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = output
        second = weights[:, 1] < beta * weights[:, 0]
        if experts is not None:
            second = second & torch.isin(index[:, 1], torch.tensor(experts))
        kept = weights.clone()
        kept[:, 1] = weights[:, 1].masked_fill(second, 0)
        if router.norm_topk_prob:
            kept = kept / kept.sum(-1, keepdim=True)
        return logits, kept, index

    return skip


def tables(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One a ground."""
    for ground in dict.fromkeys(run["ground"] for run in runs):
        own = [run for run in runs if run["ground"] == ground]
        names = {"forget_rouge_l_recall": "forget", "retain_rouge_l_recall": "retain", **{g: g for g in GROUPS}}
        columns = [name for name in names if name in own[0]["scores"]]
        lines = [f"{ground}\n", f"| experts | control | {' | '.join(names[c] for c in columns)} |"]
        lines.append("|---" * (len(columns) + 2) + "|")
        for run in own:
            means = " | ".join(f"{run['scores'][column]:.3f}" for column in columns)
            lines.append(f"| {run['experts']} | {run['control']} | {means} |")
        yield "\n".join(lines)


if __name__ == "__main__":
    main()
