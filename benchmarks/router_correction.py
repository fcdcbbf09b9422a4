"""What correcting the routers above the edited layer (GRIP, https://arxiv.org/abs/2601.16905) gives and costs.

    python benchmarks/router_correction.py [--output_dir outputs/router_correction] [--seeds 0 1 2]

Each loss of `table3.py` unlearns the bundled model's forget topic in the expert that attribution chooses, until the
forget ROUGE-L is down to the retrained twin's + 0.05. Then `correct_routers` runs on the retain rows of the training,
and everything is measured again: routing on retain rows that neither has seen and on the forget rows, and ROUGE-L.
Every run is appended to `runs.jsonl` and not repeated: a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from table3 import LOSSES, Ground, StopAtMatchedForgetting, Table3Arguments, adapter, load, prepare, rouge
from table3 import training_arguments as table3_training
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningTrainer, correct_routers, find_moe_blocks
from uoe_peft.attribution.sampling import SampleBatches, sample_batches
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.training.router_correction import routing_kept


@dataclass
class CorrectionArguments:
    """What to run."""

    output_dir: Path = field(default=Path("outputs/router_correction"), metadata={"help": "Where runs.jsonl goes."})
    losses: list[str] = field(default_factory=lambda: list(LOSSES), metadata={"help": "Columns of the table."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of training."})
    rate: float = field(default=3e-3, metadata={"help": "Learning rate, constant."})
    ridge: float = field(default=1e-3, metadata={"help": "See correct_routers."})
    min_cosine: float = field(default=0.95, metadata={"help": "See correct_routers."})


def main() -> None:
    """Run and print a table."""
    (args,) = HfArgumentParser(CorrectionArguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    table3 = Table3Arguments(output_dir=args.output_dir)
    ground, _ = prepare(table3)
    unseen = load_facts([t for t in TOPICS if t != FORGET_TOPIC]).train_test_split(test_size=0.5, seed=0)["test"]
    sets = {"retain": unseen, "forget": ground.forget}
    tokens = {
        name: sample_batches(
            rows, ground.tokenizer, max_tokens=10_000, batch_size=50, max_length=None, seed=0, name=name
        )
        for name, rows in sets.items()
    }
    path = args.output_dir / "runs.jsonl"
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["loss"], row["seed"]) for row in runs}
    for loss, seed in product(args.losses, args.seeds):
        if (loss, seed) not in done:
            runs.append(run(ground, table3, args, tokens, loss=loss, seed=seed))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    print(table(runs, args.losses))


def run(
    ground: Ground,
    table3: Table3Arguments,
    args: CorrectionArguments,
    tokens: dict[str, SampleBatches],
    *,
    loss: str,
    seed: int,
) -> dict[str, Any]:
    """One unlearning, measured before and after its correction."""
    set_seed(seed)
    trainer = UnlearningTrainer(
        model=load(str(checkpoint_path("base")), table3),
        args=table3_training(ground, table3, loss=loss, part="UOE", rate=args.rate, seed=seed),
        train_dataset=ground.forget,
        retain_dataset=ground.retain,
        processing_class=ground.tokenizer,
        peft_config=adapter("UOE", ground.attribution.top(1)),
        callbacks=[StopAtMatchedForgetting(ground, table3)],
    )
    trainer.train()
    model: Any = trainer.model
    before = measure(model, ground, table3, tokens)
    correction = correct_routers(
        model,
        ground.retain,
        processing_class=ground.tokenizer,
        ridge=args.ridge,
        min_cosine=args.min_cosine,
        batch_size=50,
    )
    print(f"{loss}, seed {seed}\n{correction.summary()}", flush=True)
    after = measure(model, ground, table3, tokens)
    return {"loss": loss, "seed": seed, "accepted": correction.accepted_layers, "before": before, "after": after}


def measure(
    model: Any, ground: Ground, table3: Table3Arguments, tokens: dict[str, SampleBatches]
) -> dict[str, list[float]]:
    """ROUGE-L by set; cosine of scores and Jaccard of selections by set, one value for each layer above the edited."""
    lowest = ground.attribution.top(1)[0][0]
    layers = [block.layer_idx for block in find_moe_blocks(model) if block.layer_idx > lowest]
    found = {f"{name} ROUGE-L": [value] for name, value in rouge(model, ground.asked, ground.tokenizer, table3).items()}
    for name, batches in tokens.items():
        kept = routing_kept(model, batches, layers)
        found[f"{name} cosine"] = [kept[layer_idx].cosine for layer_idx in layers]
        found[f"{name} Jaccard"] = [kept[layer_idx].jaccard for layer_idx in layers]
    return found


def table(runs: list[dict[str, Any]], losses: list[str]) -> str:
    """Means over seeds, before and after, layers apart. Markdown."""
    by_loss = {loss: [run for run in runs if run["loss"] == loss] for loss in losses}

    def means(loss: str, when: str, name: str) -> str:
        per_layer = zip(*(run[when][name] for run in by_loss[loss]), strict=True)
        return " / ".join(f"{fmean(values):.3f}" for values in per_layer)

    lines = ["| | " + " | ".join(losses) + " |", "|---" * (len(losses) + 1) + "|"]
    for name in runs[0]["before"]:
        cells = [f"{means(loss, 'before', name)} → {means(loss, 'after', name)}" for loss in losses]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    accepted = [", ".join(str(run["accepted"]) for run in by_loss[loss]) for loss in losses]
    return "\n".join([*lines, "| layers corrected | " + " | ".join(accepted) + " |"])


if __name__ == "__main__":
    main()
