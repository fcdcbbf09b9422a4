"""What forgetting an edge or a node of a graph does to its neighbours, by their distance; and who spares them.

    python benchmarks/linked.py [--output_dir outputs/linked] [--seeds 0 1] [--minutes 30]

`linked_facts.py` makes two graphs of 19 edges with six facts each: contracts of companies, kinships of people. A small
model learns all of them from scratch, beside questions about entities that nothing links, which it learns to decline;
for each request a twin learns the same but for what is requested: a contract of the two busiest companies ("hub edge"),
one far out ("rim edge"), or all contracts of the busiest company ("hub node"). Unlearning is the demo's: NPO with
refusals and 8 times the retain loss, 200 steps, rates as in `card.py`. Training to keep reads a half of each kept
edge's facts; the other halves are asked, by how many edges away they are from what is forgotten. `--kept far`: it reads
none that a path leads to, as where nobody thought of the neighbours. `--kept "hidden states"`: it reads the same rows,
and keeps hidden states after the last layer (`relative_embed_diff`, weight 100) in the place of answers.

Scores are ROUGE-L recall of greedy answers. Models stay in `output_dir`, runs are appended to `runs.jsonl`, and neither
is made twice; `--minutes 0` prints the tables.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from card import RATES, training_arguments
from datasets import Dataset, disable_progress_bars
from linked_facts import COMPANIES, DOMAINS, Request, hops, linked_facts, linked_graph, requested, unknown_links
from natural import new_model, train_step
from peft import LoraConfig, PeftConfig
from resumed import Runs
from tofu_model import adamw, set_rate, shuffled_batches, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall

PARTS = tuple(RATES)  # "one expert", "2 of each layer", "LoRA", "all parameters"
HIDDEN = {"retain_loss": "relative_embed_diff", "rmu_layer": -1, "retain_weight": 100.0}
GROUPS = ("forgotten", "1 edge away", "2 edges away", "3 or more", "no path", "other domain")
Row = Mapping[str, Any]


@dataclass
class LinkedArguments:
    """What to learn and to forget, for how long."""

    output_dir: Path = field(default=Path("outputs/linked"), metadata={"help": "Where models and runs go."})
    requests: list[str] = field(default_factory=lambda: [*get_args(Request)], metadata={"help": "What is forgotten."})
    parts: list[str] = field(default_factory=lambda: [*PARTS], metadata={"help": "What is trained."})
    kept: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "What training keeps, and how."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of graphs, facts and all training."})
    epochs: int = field(default=40, metadata={"help": "Passes over the facts."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this; start again to go on."})


def main() -> None:
    """Run what is not there yet, and print the tables."""
    (args,) = HfArgumentParser(LinkedArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs = Runs(args.output_dir, minutes=args.minutes)
    grounds: dict[int, LinkedGround] = {}
    names = ("seed", "request", "kept", "part")
    for key in runs.missing(dict(zip(names, run, strict=True)) for run in wanted(args)):
        seed, request, kept, part = (key[name] for name in names)
        ground = grounds.setdefault(seed, LinkedGround(args.output_dir / str(seed), seed=seed, epochs=args.epochs))
        runs.keep(key | ground.run(request, part, kept))
    print("\n\n".join(tables(runs)))


def wanted(args: LinkedArguments) -> Iterator[tuple[int, Any, str, str]]:
    """Seed, request, what is kept, and what is trained; base and twin, which keep everything, go first.

    Raises:
        ValueError: A word is none of those that an option takes.
    """
    known = {"requests": get_args(Request), "parts": PARTS, "kept": ("all", "far", "hidden states")}
    for name, words in known.items():
        if unknown := sorted(set(getattr(args, name)) - set(words)):
            raise ValueError(f"--{name} takes {list(words)}, got {unknown}")
    for seed, request in product(args.seeds, args.requests):
        yield from ((seed, request, "all", part) for part in ("base", "retrained"))
        yield from ((seed, request, kept, part) for kept, part in product(args.kept, args.parts))


class LinkedGround:
    """The facts of a seed, the models that learned them, and what is asked.

    Args:
        folder: Where models are kept.
        seed: Of everything.
        epochs: Passes over the facts.
    """

    def __init__(self, folder: Path, *, seed: int, epochs: int) -> None:
        self.folder, self.seed, self.epochs = folder, seed, epochs
        self.graph = linked_graph(seed=seed)
        self.facts = [row for domain in DOMAINS for row in linked_facts(domain, self.graph, seed=seed)]
        self.unknown = [row for domain in DOMAINS for row in unknown_links(domain, self.graph, seed=seed)]

    @cached_property
    def tokenizer(self) -> Any:
        """Trained on every text, once a seed."""
        if not (self.folder / "base" / "tokenizer.json").exists():
            train_tokenizer(Dataset.from_list(phrased([*self.facts, *self.unknown]))).save_pretrained(
                self.folder / "base"
            )
        return AutoTokenizer.from_pretrained(self.folder / "base")

    def load(self, request: Request | None) -> Any:
        """The model that learned everything, or the twin that never saw what is requested; trained where it is missing.

        From disk: a copy of a model that was trained would go on calling the original.
        """
        folder = self.folder / ("base" if request is None else f"without_{request.replace(' ', '_')}")
        tokenizer = self.tokenizer
        if not (folder / "model.safetensors").exists():
            facts = self.facts if request is None else self.split(request)[1]
            model = taught(facts, self.unknown, tokenizer, epochs=self.epochs, seed=self.seed)
            model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def split(self, request: Request) -> tuple[list[Row], list[Row]]:
        """The facts of the requested contracts, and all others."""
        gone = requested(self.graph, request)
        parts: tuple[list[Row], list[Row]] = ([], [])
        for row in self.facts:
            is_gone = row["domain"] == COMPANIES.name and tuple(row["edge"]) in gone
            parts[not is_gone].append(row)
        return parts

    def group(self, row: Row, request: Request) -> str:
        """One of `GROUPS`."""
        if row["domain"] != COMPANIES.name:
            return GROUPS[-1]
        away = hops(self.graph, requested(self.graph, request))[tuple(row["edge"])]
        return "no path" if away is None else GROUPS[min(away, 3)]

    def run(self, request: Request, part: str, kept: str) -> dict[str, Any]:
        """Scores by group, and the seconds of the CPU that training took."""
        if part in ("base", "retrained"):
            return {"scores": self.scores(self.load(None if part == "base" else request), request)}
        forget, others = self.split(request)
        read = [row for row in others if in_training(row)]
        if kept == "far":
            read = [row for row in read if self.group(row, request) in GROUPS[-2:]]
        set_seed(self.seed)
        base = self.load(None)
        adapter = self.adapter(part, base, forget, read)
        with tempfile.TemporaryDirectory() as folder:
            args = training_arguments(Path(folder), rate=RATES[part], seed=self.seed, calibrate=False)
            trainer = UnlearningTrainer(
                model=base,
                args=replace(args, **HIDDEN) if kept == "hidden states" else args,
                train_dataset=as_set(forget),
                retain_dataset=as_set(read),
                processing_class=self.tokenizer,
                peft_config=adapter,
            )
            started = time.process_time()
            trainer.train()
        found: dict[str, Any] = {"seconds": round(time.process_time() - started, 1)}
        if isinstance(adapter, UOEConfig):
            found["experts"] = adapter.target_experts
        return found | {"scores": self.scores(trainer.model.eval(), request)}

    def adapter(self, part: str, base: Any, forget: Sequence[Row], read: Sequence[Row]) -> PeftConfig | None:
        """What is trained; None: all parameters."""
        match part:
            case "all parameters":
                return None
            case "LoRA":
                return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        found = attribute_experts(
            base,
            as_set(forget),
            processing_class=self.tokenizer,
            score="contrast",
            retain_dataset=as_set(read),
            batch_size=50,
            show_progress=False,
        )
        return UOEConfig(target_experts=found.top(1) if part == "one expert" else found.top(2, strategy="each_layer"))

    def asked(self, request: Request) -> list[Row]:
        """All that is forgotten, and of the rest what training to keep does not read."""
        return [row for row in self.facts if self.group(row, request) == "forgotten" or not in_training(row)]

    def scores(self, model: Any, request: Request) -> dict[str, float]:
        """Mean ROUGE-L recall of each group that is there."""
        rows = self.asked(request)
        prompts = [self.tokenizer(row["prompt"])["input_ids"] for row in rows]
        answers = greedy_answers(model, prompts, tokenizer=self.tokenizer, max_new_tokens=40, batch_size=150)
        recalls = rouge_l_recall(answers, [row["completion"].strip() for row in rows])
        found: dict[str, list[float]] = {}
        for row, recall in zip(rows, recalls, strict=True):
            found.setdefault(self.group(row, request), []).append(recall)
        return {group: round(fmean(found[group]), 4) for group in GROUPS if group in found}


def in_training(row: Row) -> bool:
    """Whether training to keep may read a fact: half of each edge's, other kinds from edge to edge."""
    return bool((row["kind"] + sum(row["edge"])) % 2)


def as_set(rows: Sequence[Row]) -> Dataset:
    """The columns that training reads."""
    return Dataset.from_list([{name: row[name] for name in ("prompt", "completion", "alternative")} for row in rows])


def phrased(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Every phrasing of every row."""
    return [{"prompt": prompt, "completion": row["completion"]} for row in rows for prompt in row["phrasings"]]


def taught(facts: Sequence[Row], unknown: Sequence[Row], tokenizer: Any, *, epochs: int, seed: int) -> Any:
    """A new model that learned all facts, and to decline: in each pass half as many other unknown links."""
    model, draw = new_model(tokenizer, seed=seed), random.Random(seed)
    examples = {
        name: [dict(row) for row in tokenize_dataset(Dataset.from_list(phrased(rows)), tokenizer, max_length=None)]
        for name, rows in (("facts", facts), ("unknown", unknown))
    }
    optimizer = adamw(model)
    num_ways, num_declined = len(facts[0]["phrasings"]), len(facts) // 2
    num_batches = -(-(len(facts) + num_declined) // 8)
    for epoch in range(epochs):
        read = [examples["facts"][place * num_ways + draw.randrange(num_ways)] for place in range(len(facts))]
        read += draw.sample(examples["unknown"], num_declined)
        for place, batch in enumerate(shuffled_batches(read, batch_size=8)):
            set_rate(optimizer, epoch * num_batches + place, epochs * num_batches, peak=3e-3)
            train_step(model, optimizer, collate(batch, pad_token_id=tokenizer.pad_token_id))
    return model.eval()


def tables(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One for each request and what was kept: means over seeds."""
    for request, kept in dict.fromkeys((run["request"], run["kept"]) for run in runs):
        own = [run for run in runs if run["request"] == request and run["kept"] in (kept, "all")]
        lines = [f"{request}, {kept} kept\n", f"| trained | {' | '.join(GROUPS)} | CPU s | seeds |"]
        lines.append("|---" * (len(GROUPS) + 3) + "|")
        for part in dict.fromkeys(run["part"] for run in own):
            rows = [run for run in own if run["part"] == part and (run["kept"] == kept or part not in PARTS)]
            if rows:
                lines.append(_line(part, rows))
        yield "\n".join(lines)


def _line(part: str, rows: Sequence[Mapping[str, Any]]) -> str:
    means = []
    for group in GROUPS:
        known = [row["scores"][group] for row in rows if group in row["scores"]]
        means.append(f"{fmean(known):.2f}" if known else "")
    seconds = f"{fmean(row['seconds'] for row in rows):.0f}" if "seconds" in rows[0] else ""
    return f"| {part} | {' | '.join(means)} | {seconds} | {len(rows)} |"


if __name__ == "__main__":
    main()
