"""What the recipes of `examples/recipes` forget and keep, and how their settings were chosen.

    python examples/recipes/teach.py
    python benchmarks/recipes.py --seeds 0 1 2                    # the files as they are
    python benchmarks/recipes.py --settings "nll" "hidden 3"     # what was tried, see SETTINGS

**Choosing**: a named setting replaces what keeps the rest in a recipe's file. Training reads all that is forgotten, and
the rows to keep but 20 of the kind that is forgotten, which settings are chosen on. Nothing of `asked.jsonl` is read.
**The result**: the file as it is, trained on all its rows, asked what training never read, near rows (of the same kind)
and far ones apart, and attacked: a quarter of the forgotten rows is learned again, and the others are asked; the edited
experts are silenced. Scores are the recall of greedy answers, or the share of right options where there are some, and
the probability of the true answer. Runs are appended to `runs.jsonl` and not repeated; `--minutes 0` prints the tables.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from datasets import Dataset, disable_progress_bars
from resumed import Run, Runs
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, evaluate_unlearning
from uoe_peft.cli.loading import load_rows
from uoe_peft.evaluation import QuestionSet, Suite
from uoe_peft.evaluation.attacks import run_attack

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
NUM_FAR = 40  # rows to keep that have nothing to do with what is forgotten, which come last in retain.jsonl
NUM_CHOSEN_ON = 20
NUM_ASKED_NEAR = 20
SETS = ("forget", "near", "far")
LETTERS = [" A", " B", " C", " D"]

_LIMIT = {"calibrate": "forget", "calibrate_metric": "probability", "calibrate_forget_limit": 0.05}


def hidden(weight: float, passes: int = 12, **own: Any) -> dict[str, Any]:
    """The rest is kept by its hidden states after the last layer, and the strength is the least that forgets."""
    kept = {"retain_loss": "embed_diff", "retain_weight": weight, "rmu_layer": -1}
    return {**kept, "num_train_epochs": passes, **_LIMIT, **own}


def share(weight: float) -> dict[str, Any]:
    """The file's own settings, but for the weight: of hidden states kept as shares of their norms."""
    return {"retain_loss": "relative_embed_diff", "retain_weight": weight, "rmu_layer": -1}


_OLD = {"retain_weight": 8.0, "rmu_layer": None, "num_train_epochs": 12, "calibrate": "auto"}
_ONE = {"num_target_experts": 1, "learning_rate": 1e-2}
_STEERED = {"forget_loss": "rmu", "beta": 10.0, "completion_only_loss": False, "calibrate": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "nll": {**_OLD, "retain_loss": "nll", "calibrate_forget_limit": None},
    "hidden 3": hidden(3.0),
    "hidden 3, one expert": hidden(3.0, **_ONE),
    "hidden 1, 24 passes": hidden(1.0, 24),
    "hidden 3, 24 passes": hidden(3.0, 24),
    "hidden 10, 24 passes": hidden(10.0, 24),
    "hidden 3, 24 passes, full strength": hidden(3.0, 24, calibrate=False),
    "hidden 10, 24 passes, full strength": hidden(10.0, 24, calibrate=False),
    "hidden 3, 24 passes, rate 1e-2": hidden(3.0, 24, learning_rate=1e-2),
    "hidden 10, 24 passes, rate 1e-2": hidden(10.0, 24, learning_rate=1e-2),
    "hidden 3, 48 passes": hidden(3.0, 48),
    "hidden 6, 48 passes, limit 0.15": hidden(6.0, 48, calibrate_forget_limit=0.15),
    "hidden 3, 48 passes, refusals 0.2": hidden(3.0, 48, alternative_weight=0.2),
    "hidden 10, 48 passes": hidden(10.0, 48),
    "hidden 3, 96 passes, limit 0.1": hidden(3.0, 96, calibrate_forget_limit=0.1),
    **{f"share {weight}": share(weight) for weight in (10, 30, 100, 300, 1000, 3000)},
    "rmu, hidden 3": hidden(3.0, **_STEERED),
    "rmu, hidden 30": hidden(30.0, **_STEERED),
    "rmu, hidden 30, 24 passes": hidden(30.0, 24, **_STEERED),
}


@dataclass
class RecipesArguments:
    """What to run, for how long."""

    model: Path = field(default=Path("outputs/recipes/model"), metadata={"help": "What teach.py wrote."})
    output_dir: Path = field(default=Path("outputs/recipes/tried"), metadata={"help": "Where runs go."})
    recipes: list[str] = field(
        default_factory=lambda: sorted(path.stem for path in RECIPES.glob("*.yaml")), metadata={"help": "Which."}
    )
    settings: list[str] = field(default_factory=lambda: ["file"], metadata={"help": "Those to choose from, or file."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this; start again to go on."})


def main() -> None:
    """Run what is not there yet, and print the tables."""
    (args,) = HfArgumentParser(RecipesArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs = Runs(args.output_dir, minutes=args.minutes)
    wanted = product(args.seeds, args.recipes, args.settings)
    for key in runs.missing({"recipe": recipe, "setting": name, "seed": seed} for seed, recipe, name in wanted):
        runs.keep(key | (result(args, key) if key["setting"] == "file" else choice(args, key)))
    print(choices_table(runs), results_table(runs), sep="\n\n")


def choice(args: RecipesArguments, key: Run) -> Run:
    """What a setting forgets, and what it keeps of near rows that training does not read."""
    rows = load(key["recipe"])
    kept, chosen_on = split(rows["retain"])
    settings = read(key["recipe"]) | SETTINGS[key["setting"]]
    model, tokenizer, trained = train(args.model, rows["forget"], kept, settings, key["seed"], aside=chosen_on)
    suite = Suite("choice", (QuestionSet("forget", rows["forget_asked"], "forget"), near(as_asked(chosen_on))))
    return trained | scores(model, tokenizer, suite)


def result(args: RecipesArguments, key: Run) -> Run:
    """What the file as it is forgets and keeps, and what comes back."""
    rows = load(key["recipe"])
    model, tokenizer, trained = train(args.model, rows["forget"], rows["retain"], read(key["recipe"]), key["seed"])
    learned = range(0, len(rows["forget"]), 4)
    others = [place for place in range(len(rows["forget"])) if place not in learned]
    suite = Suite(
        "result",
        (
            QuestionSet("forget", rows["forget_asked"].select(others), "forget"),
            near(rows["asked"].select(range(NUM_ASKED_NEAR))),
            QuestionSet("far", far_rows(), "retain"),
        ),
    )
    return trained | scores(model, tokenizer, suite, relearned=rows["forget"].select(learned))


def train(
    folder: Path, forget: Dataset, kept: Dataset, settings: Run, seed: int, *, aside: Dataset | None = None
) -> tuple[Any, Any, Run]:
    """As `uoe-peft unlearn` does with the same settings; where rows are set aside, strengths are tried on them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = {entry.name for entry in fields(UnlearningConfig)} - {"output_dir", "logging_steps"}
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = UnlearningTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=UnlearningConfig(
                scratch,
                **{name: value for name, value in settings.items() if name in known},
                seed=seed,
                logging_steps=1000,
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=True,
            ),
            train_dataset=forget,
            retain_dataset=kept,
            eval_dataset=None if aside is None else {"retain": aside},
            processing_class=tokenizer,
            peft_config=UOEConfig(target_experts="auto"),
        )
        trainer.train()
    strength = 1.0 if trainer.strength_choice is None else trainer.strength_choice.scale
    seconds = round(time.process_time() - started, 1)
    return trainer.model.eval(), tokenizer, {"strength": round(strength, 3), "seconds": seconds}


def scores(model: Any, tokenizer: Any, suite: Suite, *, relearned: Dataset | None = None) -> Run:
    """By model and set, score and probability; under attack, the score of the forget set."""
    attacks = {
        "silenced": partial(run_attack, "silenced_expert"),
        "relearned": partial(run_attack, "relearning", dataset=relearned, processing_class=tokenizer),
    }
    report = evaluate_unlearning(
        model,
        suite,
        processing_class=tokenizer,
        attacks={} if relearned is None else attacks,
        batch_size=40,
        max_new_tokens=64,
    )
    found: Run = {
        name: {own: [round(mean.score, 4), round(mean.probability, 4)] for own, mean in report.scores[name].items()}
        for name in ("base", "unlearned")
    }
    return found | {run.result.name: forget_score(run.result.after) for run in report.attacks}


def forget_score(under_attack: Mapping[str, float]) -> float:
    """Of a set with options their accuracy, else the recall."""
    names = ("forget_accuracy", "forget_rouge_l_recall")
    return round(next(under_attack[name] for name in names if name in under_attack), 4)


def read(recipe: str) -> Run:
    """A recipe's file."""
    settings: Run = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text("utf-8"))
    return settings


def load(recipe: str) -> dict[str, Dataset]:
    """A recipe's sets; `forget_asked` is the forget set itself where that can be asked."""
    rows = {path.stem: load_rows(str(path)) for path in (RECIPES / "data" / recipe).glob("*.jsonl")}
    return {"forget_asked": rows["forget"], **rows}


def far_rows() -> Dataset:
    """Facts that have nothing to do with any recipe, and that no training reads; the same for all."""
    asked = load("personal_data")["asked"]
    return asked.select(range(NUM_ASKED_NEAR, len(asked)))


def split(retain: Dataset) -> tuple[Dataset, Dataset]:
    """The rows for training, and the last near ones."""
    num_near = len(retain) - NUM_FAR
    held = range(num_near - NUM_CHOSEN_ON, num_near)
    return retain.select([place for place in range(len(retain)) if place not in held]), retain.select(held)


def near(rows: Dataset) -> QuestionSet:
    """Rows to keep of the kind that is forgotten."""
    return QuestionSet("near", rows, "retain")


def as_asked(rows: Dataset) -> Dataset:
    """In the form of `asked.jsonl`: text is asked by its first eight words, and letters are options."""
    if "text" in rows.column_names:
        words = [text.split(" ") for text in rows["text"]]
        return Dataset.from_list(
            [{"prompt": " ".join(own[:8]), "completion": " " + " ".join(own[8:])} for own in words]
        )
    if not set(rows["completion"]) <= set(LETTERS):
        return rows
    return rows.map(lambda row: {"options": LETTERS, "label": LETTERS.index(row["completion"])})


def choices_table(runs: Sequence[Run]) -> str:
    """As Markdown: score / probability of what is forgotten, and of the near rows that settings are chosen on."""
    lines = ["| recipe | setting | strength | forgotten | kept, near | CPU s |", "|---" * 6 + "|"]
    for own in (own for own in runs if own["setting"] != "file"):
        before, after = own["base"], own["unlearned"]
        cells = [f"{pair(before[name])} to {pair(after[name])}" for name in ("forget", "near")]
        head = f"| {own['recipe']} | {own['setting']} | {own['strength']:.2f} |"
        lines.append(f"{head} {cells[0]} | {cells[1]} | {own['seconds']:.0f} |")
    return "\n".join(lines)


def results_table(runs: Sequence[Run]) -> str:
    """As Markdown, means over seeds: score / probability before and after, and the forget score under attack."""
    columns = ("recipe", "seeds", "strength", "forgotten", "kept, near", "kept, far", "relearned", "silenced", "CPU s")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for recipe in sorted({own["recipe"] for own in runs if own["setting"] == "file"}):
        those = [own for own in runs if own["recipe"] == recipe and own["setting"] == "file"]
        cells = [f"{pair(means(those, 'base', name))} to {pair(means(those, 'unlearned', name))}" for name in SETS]
        attacked = [f"{fmean(own[name] for own in those):.2f}" for name in ("relearned", "silenced")]
        strengths = ", ".join(f"{own['strength']:.2f}" for own in those)
        seconds = f"{fmean(own['seconds'] for own in those):.0f}"
        lines.append(f"| {' | '.join([recipe, str(len(those)), strengths, *cells, *attacked, seconds])} |")
    return "\n".join(lines)


def means(runs: Sequence[Run], model: str, name: str) -> list[float]:
    """Score and probability of a set, over runs."""
    return [fmean(own[model][name][place] for own in runs) for place in (0, 1)]


def pair(values: Sequence[float]) -> str:
    """Score / probability."""
    return f"{values[0]:.2f} / {values[1]:.2f}"


if __name__ == "__main__":
    main()
