"""Five requests one after another on the testbed: what each has forgotten after every step, and when one is withdrawn.

    python benchmarks/requests.py [--output_dir outputs/requests] [--seeds 0 1 2] [--kinds ...] [--minutes 60]

Requests are five of the seven topics, 200 facts each; the other two are the retain set: half of it for training, 80
rows on which rates were chosen, and 120 that are asked. Every request trains an adapter of its own (the expert that
`contrast` ranks first on the model as it is then, against everything that is to be kept): NPO (beta 0.05) with
refusals, and hidden states after the last layer kept as they were, the rate falling linearly. Its strength is the least
at which the probability of its answers is down to 0.05. What is kept in training is the retain set and all topics not
yet requested, and of earlier requests:

- "one after another": their questions with refusals, and, with their adapters off, their facts (`RequestTrainer`);
- "facts not kept": their questions with refusals alone;
- "moments": no text, but their moments in the retain projection (rho 1); "text gone": nothing of them.

After the fifth request each is switched off in turn, and the second one's adapter deleted. "Apart": each adapter is
trained on the base alone, and keeps what the others forget; a gate, fitted on the 160 facts of each request that are
not asked and on the retain rows of training, chooses for each prompt; or the five are combined to one. "One expert"
(SPUNGE): the five as one forget set, split by its column "topic", an adapter of the same expert each, then combined;
"union": one adapter on all of it, with as many steps. Rivals: "all parameters", "SSU" and "orthogonal LoRA"; "rates"
tries three for each of them, and for UOE, on the first request. `--ground DIR`: in place of topics the authors that
`grounds.py` wrote to be forgotten, each a request.

Scores: ROUGE-L recall of greedy answers, 40 facts of each request and 120 of the retain set. Every row is appended to
`runs.jsonl` as it comes and not run again, so that what was stopped goes on; `--minutes 0` prints the tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import disable_progress_bars
from requests_combining import apart, one_expert
from requests_ground import Ground, Recipe
from requests_rates import rates
from requests_rivals import in_full, orthogonal_lora, ssu
from requests_sequence import one_after_another, union
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

KINDS = (
    "one after another",
    "apart",
    "facts not kept",
    "text gone",
    "moments",
    "union",
    "one expert",
    "all parameters",
    "SSU",
    "orthogonal LoRA",
    "rates",
)


@dataclass
class RequestsArguments:
    """What to run, for how long."""

    output_dir: Path = field(default=Path("outputs/requests"), metadata={"help": "Where runs go."})
    ground: Path | None = field(default=None, metadata={"help": "A folder of TOFU authors; None: the testbed."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": "What is compared."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    minutes: float = field(default=60.0, metadata={"help": "No step begins after this; start again to go on."})


def main() -> None:
    """Run what is not there yet, and print the tables."""
    args, recipe = HfArgumentParser((RequestsArguments, Recipe)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, ends = args.output_dir / "runs.jsonl", time.perf_counter() + args.minutes * 60
    runs = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    ground = Ground(args.output_dir, recipe, args.ground)
    for seed in args.seeds:
        for kind in args.kinds:
            set_seed(seed)
            done = {run["step"] for run in runs if (run["kind"], run["seed"]) == (kind, seed)}
            rows = steps(ground, kind, seed, done)
            while time.perf_counter() < ends and (row := next(rows, None)) is not None:
                runs.append({"kind": kind, "seed": seed, **row})
                print(runs[-1], flush=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    print(tables(runs, ground.names))


def steps(ground: Ground, kind: str, seed: int, done: Container[str]) -> Iterator[Mapping[str, Any]]:
    """The steps of a kind that are not done."""
    match kind:
        case "one after another":
            yield from one_after_another(ground, seed, done, known="refusals and facts", folder="sequence")
        case "facts not kept":
            yield from one_after_another(ground, seed, done, known="refusals", folder="facts_not_kept")
        case "text gone":
            yield from one_after_another(ground, seed, done, known="nothing", folder="text_gone")
        case "moments":
            yield from one_after_another(ground, seed, done, known="moments", folder="moments")
        case "apart":
            yield from apart(ground, seed, done)
        case "one expert":
            yield from one_expert(ground, seed, done)
        case "all parameters":
            yield from in_full(ground, seed, done)
        case "SSU":
            yield from ssu(ground, seed, done)
        case "orthogonal LoRA":
            yield from orthogonal_lora(ground, seed, done)
        case "rates":
            yield from rates(ground, seed, done)
        case "union":
            yield from () if "union" in done else union(ground, seed)
        case _:
            raise ValueError(f"unknown kind {kind!r}; use some of {KINDS}")


def tables(runs: list[Mapping[str, Any]], names: Sequence[str]) -> str:
    """For each kind, a row a step: means over seeds."""
    columns = (*names, "retain")
    lines = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        lines += [
            f"\n{kind}\n",
            f"| after | {' | '.join(columns)} | strength | seeds |",
            "|---" * (len(columns) + 3) + "|",
        ]
        own = [run for run in runs if run["kind"] == kind]
        for step in dict.fromkeys(run["step"] for run in own):
            rows = [run for run in own if run["step"] == step]
            means = " | ".join(f"{fmean(row[name] for row in rows):.3f}" if name in rows[0] else "" for name in columns)
            strengths = [f"{row['strength']:.2f}" for row in rows if "strength" in row]
            lines.append(f"| {step} | {means} | {', '.join(strengths)} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
