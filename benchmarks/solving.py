"""Unlearning without training: which experts, and how much retain tokens count, on the testbed or another ground.

    python benchmarks/solving.py [--ground outputs/tofu_tau0.6] [--seeds 0 1 2] [--output_dir outputs/solving]

`solve_unlearning` moves the outputs of up to four experts along one direction. Experts are the best by `contrast`, of
all layers or of some. Scores, rows and halves are those of `trials.py`: of each number of experts' settings the one
counts that forgets most on the validation rows of the first seed, of those that keep 0.90 of the base's retain score
there; further seeds, which draw other directions, are run at that one. A goal stands beside the figures: the twin's
forgetting + 0.05 with 0.90 of retain, in less CPU time than an epoch of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import disable_progress_bars
from resumed import Run, Runs
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging
from trials import KEPT, Ground, spread
from trials_training import Pairs

from uoe_peft import ExpertAttribution, solve_unlearning

LAST = 3  # layer
# (retain_weight, coefficient, keep_retain); the first are the defaults.
SETTINGS = ((3.0, 5.0, 0.97), (10.0, 5.0, 0.98), (30.0, 10.0, 0.98))


def best_of(found: ExpertAttribution, **numbers: int) -> Pairs:
    """So many experts of single layers, given as `l0=2`."""
    pairs = []
    for name, number in numbers.items():
        others = set(range(LAST + 1)) - {int(name.removeprefix("l"))}
        pairs += found.top(number, strategy="each_layer", exclude_layers=sorted(others))
    return sorted(pairs)


def experts_of(found: ExpertAttribution) -> dict[str, Pairs]:
    """By name, what is edited."""
    return {
        "1": found.top(1),
        "2": found.top(2),
        "4": found.top(4),
        "1 of each layer": found.top(1, strategy="each_layer"),
        "1 of layer 0": best_of(found, l0=1),
        "2 of layer 0": best_of(found, l0=2),
        "4 of layer 0": best_of(found, l0=4),
        "2 of layer 0, 2 of the last": best_of(found, l0=2, l3=2),
        "4 of the last": best_of(found, l3=4),
    }


@dataclass
class SolvingArguments:
    """What to solve, on what."""

    output_dir: Path = field(default=Path("outputs/solving"), metadata={"help": "Where runs go."})
    ground: Path | None = field(default=None, metadata={"help": "Folder that grounds.py wrote; None: the testbed."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the direction."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this."})


def main() -> None:
    """Run what is not there yet, and print the table."""
    (args,) = HfArgumentParser(SolvingArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs, ground = Runs(args.output_dir, minutes=args.minutes), Ground(args.ground)
    experts = experts_of(ground.found)
    for key in runs.missing(planned(runs, experts, args.seeds)):
        runs.keep({**key, **solve(ground, key, experts)})
    print(table(runs, experts))


def planned(runs: list[Run], experts: Iterable[str], seeds: list[int]) -> Iterator[Run]:
    """Base and twin, every setting of the first seed, and of further seeds what it chose."""
    first, *further = seeds
    yield from ({"experts": name, "setting": [], "seed": first} for name in ("base", "retrained"))
    for name, setting in product(experts, SETTINGS):
        yield {"experts": name, "setting": list(setting), "seed": first}
    for seed, name in product(further, experts):
        yield {"experts": name, "setting": chosen(runs, name, first)["setting"], "seed": seed}


def solve(ground: Ground, key: Run, experts: dict[str, Pairs]) -> dict[str, Any]:
    """Scores of validation and test rows, and CPU seconds of solving, the search for the strength included."""
    started = time.process_time()
    if key["setting"]:
        retain_weight, coefficient, keep_retain = key["setting"]
        model: Any = solve_unlearning(
            ground.load("base"),
            ground.forget,
            ground.retain,
            processing_class=ground.tokenizer,
            target_experts=experts[key["experts"]],
            retain_weight=retain_weight,
            coefficient=coefficient,
            keep_retain=keep_retain,
            seed=key["seed"],
            show_progress=False,
        )
    else:
        model = ground.load(key["experts"])
    seconds = time.process_time() - started
    return {"seconds": round(seconds, 1), **ground.ask(model, "forget"), **ground.ask(model, "retain")}


def chosen(runs: list[Run], name: str, first: int) -> Run:
    """The first seed's run that forgets most on validation rows, of those that keep enough there."""
    own = [run for run in runs if (run["experts"], run["seed"]) == (name, first)]
    enough = KEPT * next(run["retain_validation"] for run in runs if run["experts"] == "base")
    keeping = [run for run in own if run["retain_validation"] >= enough]
    if keeping:
        return min(keeping, key=lambda run: run["forget_validation"])
    return max(own, key=lambda run: run["retain_validation"])


def table(runs: list[Run], experts: Iterable[str]) -> str:
    """Means over seeds of the chosen settings, as Markdown."""
    first = runs[0]["seed"]
    names = ("experts", "retain weight, coefficient, kept", "validation", "forget", "retain", "CPU s", "seeds")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name in ("base", "retrained", *experts):
        best = chosen(runs, name, first)
        own = [run for run in runs if (run["experts"], run["setting"]) == (name, best["setting"])]
        lines.append(
            f"| {name} | {', '.join(f'{number:g}' for number in best['setting'])} "
            f"| {best['forget_validation']:.3f} / {best['retain_validation']:.3f} "
            f"| {spread([run['forget_test'] for run in own])} | {spread([run['retain_test'] for run in own])} "
            f"| {fmean(run['seconds'] for run in own):.1f} | {len(own)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
