"""Which settings make the recipes of `examples/recipes` keep what they should, chosen on rows that nothing else reads.

    python examples/recipes/teach.py
    python benchmarks/recipes.py [--recipes harmful_answers ...] [--settings ...] [--output_dir outputs/recipes_tried]

Training reads 60 of a recipe's 80 rows to keep, as many near ones (of the same kind as what is forgotten) as far ones
but for 20 near rows, on which settings are to be chosen ("chosen on"); "asked" are the rows of `asked.jsonl`, which are
the result. "as it is" is the recipe's file; the other settings change what their names say. Scores are the recall of
greedy answers and the probability of the true ones, and for questions with options the share of right choices. Runs are
appended to `runs.jsonl` and not repeated; `--minutes 0` prints the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from resumed import Runs
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts, evaluate_unlearning
from uoe_peft.cli.loading import load_rows
from uoe_peft.evaluation import QuestionSet, Suite

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
NUM_CHOSEN_ON = 20
_LIMITED = {"calibrate": "forget", "calibrate_metric": "probability", "calibrate_forget_limit": 0.05}
_HIDDEN = {"retain_loss": "embed_diff", "retain_weight": 8.0, "rmu_layer": 3, **_LIMITED}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "least strength": _LIMITED,
    "hidden states": _HIDDEN,
    "hidden states, three experts": {**_HIDDEN, "num_target_experts": 3, "learning_rate": 1e-2},
    "hidden states, one expert": {**_HIDDEN, "num_target_experts": 1, "learning_rate": 1e-2},
    "hidden states, weight 24": {**_HIDDEN, "retain_weight": 24.0},
    "hidden states, 24 epochs": {**_HIDDEN, "num_train_epochs": 24},
    "lower rate": {"learning_rate": 2e-3},
}


@dataclass
class RecipesArguments:
    """What to run, for how long."""

    model: Path = field(default=Path("outputs/recipes/model"), metadata={"help": "What teach.py wrote."})
    output_dir: Path = field(default=Path("outputs/recipes_tried"), metadata={"help": "Where runs go."})
    recipes: list[str] = field(
        default_factory=lambda: sorted(path.stem for path in RECIPES.glob("*.yaml")), metadata={"help": "Which."}
    )
    settings: list[str] = field(default_factory=lambda: [*SETTINGS], metadata={"help": "What is changed."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this; start again to go on."})


def main() -> None:
    """Run what is not there yet, and print the table."""
    (args,) = HfArgumentParser(RecipesArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs = Runs(args.output_dir, minutes=args.minutes)
    wanted = product(args.seeds, args.recipes, args.settings)
    for key in runs.missing({"seed": seed, "recipe": recipe, "setting": setting} for seed, recipe, setting in wanted):
        runs.keep(key | run(args, key["recipe"], SETTINGS[key["setting"]], seed=key["seed"]))
    print(table(runs))


def run(args: RecipesArguments, recipe: str, changes: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Scores of what is forgotten, of what settings are chosen on, and of what is asked."""
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text("utf-8")) | dict(changes)
    rows = {path.stem: load_rows(str(path)) for path in (RECIPES / "data" / recipe).glob("*.jsonl")}
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    kept, chosen_on = split(rows["retain"])
    suite = Suite(
        "recipe",
        (
            QuestionSet("forget", rows.get("forget_asked", rows["forget"]), "forget"),
            QuestionSet("chosen_on", as_asked(chosen_on), "retain"),
            QuestionSet("asked", rows["asked"], "retain"),
        ),
    )
    options: dict[str, Any] = {"processing_class": tokenizer, "batch_size": 40, "max_new_tokens": 48}
    found = attribute_experts(
        base,
        rows["forget"],
        processing_class=tokenizer,
        score=settings["attribution_score"],
        retain_dataset=kept,
        batch_size=40,
        show_progress=False,
    )
    known = {entry.name for entry in fields(UnlearningConfig)}
    own = {name: value for name, value in settings.items() if name in known and name not in ("output_dir", "seed")}
    trainer = UnlearningTrainer(
        model=base,
        args=UnlearningConfig(
            str(args.output_dir / "training"),
            **{**own, "logging_steps": 1000},
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=rows["forget"],
        retain_dataset=kept,
        processing_class=tokenizer,
        peft_config=UOEConfig(target_experts=found.top(settings["num_target_experts"])),
    )
    trainer.train()
    choice = trainer.strength_choice
    strength = 1.0 if choice is None else choice.scale
    scores = evaluate_unlearning(trainer.model.eval(), suite, **options).scores
    return {"strength": strength, **{name: figures(scores[name]) for name in ("base", "unlearned")}}


def split(retain: Dataset) -> tuple[Dataset, Dataset]:
    """The rows for training, and the last near ones; the near rows come first in a recipe's file."""
    num_near = len(retain) // 2
    held = range(num_near - NUM_CHOSEN_ON, num_near)
    return retain.select([place for place in range(len(retain)) if place not in held]), retain.select(held)


def as_asked(rows: Dataset) -> Dataset:
    """Rows of text asked by their first eight words, as in `asked.jsonl`."""
    if "prompt" in rows.column_names and all(rows["prompt"]):
        return rows.remove_columns([name for name in rows.column_names if name not in ("prompt", "completion")])
    words = [text.split(" ") for text in rows["text"]]
    return Dataset.from_list([{"prompt": " ".join(own[:8]), "completion": " " + " ".join(own[8:])} for own in words])


def figures(scores: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of each set: recall, or of options the share of right ones; and probability."""
    return {name: [round(own.score, 4), round(own.probability, 4)] for name, own in scores.items()}


def table(runs: list[dict[str, Any]]) -> str:
    """As Markdown: recall (of options: accuracy) and probability."""
    sets = ("forget", "chosen_on", "asked")
    lines = [f"| recipe | setting | strength | {' | '.join(sets)} |", "|---" * 6 + "|"]
    for run in runs:
        for name, model in (("base | ", "base"), (f"{run['setting']} | {run['strength']:.2f}", "unlearned")):
            cells = [" / ".join(f"{value:.3f}" for value in run[model][own]) for own in sets]
            lines.append(f"| {run['recipe']} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
