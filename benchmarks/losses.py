"""A row for each loss, optimiser and option that `table3.py` has none of: what it gives at equal steps on the testbed.

    python benchmarks/losses.py [--output_dir outputs/losses] [--rows simnpo dpo] [--seeds 0 1 2] [--minutes 60]

Every row unlearns the shipped model's forget topic in the same expert, with the same retain loss, anchor, examples,
number of steps and number of learning rates. The trained adapter is kept at each look; afterwards its scale is swept,
too. Of all rates, looks and scales the one with the best retain ROUGE-L among those whose forget ROUGE-L is within the
limit (the retrained twin's + `margin`) is chosen on a validation half of the asked rows, alike for all rows of the
table; where none is within the limit, the one with the lowest forget ROUGE-L, and the row is marked with a star. What
is reported is the other half, the test half. Each seed chooses for itself.

Sophia, WAGLE, TRACE and `offload_prefix` change NPO, so they are to be read against its row; `offload_prefix` should
change nothing but time. Every run is appended to `runs.jsonl` and not repeated: a benchmark that was stopped goes on
where it was; `--minutes 0` only prints the table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

NPO = {"forget_loss": "npo", "beta": 0.05}
ROWS: dict[str, dict[str, Any]] = {
    "npo": NPO,
    "npo, Sophia": {**NPO, "optim": "sophia"},
    "npo, WAGLE": {**NPO, "weight_mask_ratio": 0.8},
    "npo, TRACE": {**NPO, "retain_token_weights": "trace"},
    "npo, offload_prefix": {**NPO, "prefix_cache": True, "offload_prefix": True},
    "simnpo": {"forget_loss": "simnpo"},
    "dpo": {"forget_loss": "dpo", "beta": 0.05},
    "idk": {"forget_loss": "idk"},
    "undial": {"forget_loss": "undial"},
    "wga": {"forget_loss": "wga"},
    "satimp": {"forget_loss": "satimp"},
    "random_label": {"forget_loss": "random_label"},
    "adversarial_label": {"forget_loss": "adversarial_label"},
}
MAY_CHANGE = ("output_dir", "rows", "seeds", "rates", "minutes")
Scores = dict[str, float]  # mean ROUGE-L recall by set


@dataclass
class LossesArguments:
    """What to run, for how long, how often."""

    output_dir: Path = field(default=Path("outputs/losses"), metadata={"help": "Where runs and table go."})
    rows: list[str] = field(default_factory=lambda: list(ROWS), metadata={"help": "Rows of the table."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    minutes: float = field(default=120.0, metadata={"help": "No run begins after this; start again to go on."})
    rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "Learning rates."})
    steps: int = field(default=120, metadata={"help": "Of every run; the rate is constant."})
    look_every: int = field(default=40, metadata={"help": "Steps between two adapters to choose from."})
    scales: list[float] = field(default_factory=lambda: [1.0, 0.85, 0.7, 0.55], metadata={"help": "Of the adapter."})
    batch_size: int = field(default=8, metadata={"help": "Forget rows a step, and as many retain rows."})
    retain_weight: float = field(default=4.0, metadata={"help": "Weight of the retain loss, nll."})
    anchor_weight: float = field(default=1.0, metadata={"help": "Weight of the router anchor."})
    score: str = field(default="contrast", metadata={"help": "Attribution that chooses the expert."})
    margin: float = field(default=0.05, metadata={"help": "Above the twin's forget ROUGE-L."})
    num_forget: int = field(default=40, metadata={"help": "Forget rows that are asked, in each half."})
    num_retain: int = field(default=40, metadata={"help": "Held-out retain rows that are asked, in each half."})
    max_new_tokens: int = field(default=48, metadata={"help": "Where an answer is cut."})


@dataclass(frozen=True)
class Ground:
    """What all runs share: training rows, questions by half and set, the expert, the twin's scores by half."""

    forget: Dataset
    retain: Dataset
    asked: dict[str, dict[str, Questions]]
    tokenizer: Any
    experts: list[tuple[int, int]]
    twin: dict[str, Scores]


@dataclass(frozen=True)
class Run:
    """One training, and what was chosen of it.

    Attributes:
        row: Row of the table.
        rate: Learning rate.
        seed: Of training.
        seconds: Of the CPU, for training alone; with an accelerator, by the clock.
        diverged: Whether a loss stopped being a number; adapters of looks before that still count.
        swept: Step, scale, and forget and retain ROUGE-L on the validation half, of every look and scale.
        step: The chosen look.
        scale: The chosen scale.
        validation: Scores of the choice on the validation half.
        test: The same on the test half.
    """

    row: str
    rate: float
    seed: int
    seconds: float
    diverged: bool
    swept: list[list[float]]
    step: int
    scale: float
    validation: Scores
    test: Scores

    @property
    def key(self) -> tuple[str, float, int]:
        """What makes it this run."""
        return self.row, self.rate, self.seed


def main() -> None:
    """Run what has not been run, then print and write the table."""
    (args,) = HfArgumentParser(LossesArguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(1)
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        raise ValueError(f"unknown rows {sorted(unknown)}; use {list(ROWS)}")
    if args.steps % args.look_every:
        raise ValueError(f"the last look must be at the end: --steps {args.steps} is no multiple of {args.look_every}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_settings(args)
    path, until = args.output_dir / "runs.jsonl", time.perf_counter() + 60 * args.minutes
    runs = [Run(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    ground = prepare(args)
    for key in planned(args, done={run.key for run in runs}):
        if time.perf_counter() > until:
            print(f"{args.minutes} minutes are over; start again to go on")
            break
        runs.append(unlearn(ground, args, *key))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(runs[-1])) + "\n")
        print(runs[-1], flush=True)
    text = table(ground, args, runs)
    (args.output_dir / "losses.md").write_text(text, encoding="utf-8")
    print(text)


def check_settings(args: LossesArguments) -> None:
    """Write what all runs must have in common; or compare with what is written, so that no table mixes two."""
    settings = {name: value for name, value in asdict(args).items() if name not in MAY_CHANGE}
    path = args.output_dir / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(name for name in settings if settings[name] != before.get(name))
    if differing:
        raise ValueError(f"the runs in {args.output_dir} had other {differing}; choose another --output_dir")


def planned(args: LossesArguments, *, done: set[tuple[str, float, int]]) -> Iterator[tuple[str, float, int]]:
    """Row, rate and seed of each run to come; one rate of every row before a second of any."""
    for seed, rate, row in product(args.seeds, args.rates, args.rows):
        if (row, rate, seed) not in done:
            yield row, rate, seed


def prepare(args: LossesArguments) -> Ground:
    """Everything that the runs share."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
    forget, others = load_facts([FORGET_TOPIC]), load_facts([t for t in TOPICS if t != FORGET_TOPIC])
    halves = others.train_test_split(test_size=0.5, seed=0)
    drawn = {
        "forget": forget.shuffle(seed=0).select(range(2 * args.num_forget)),
        "retain": halves["test"].shuffle(seed=0).select(range(2 * args.num_retain)),
    }
    asked = {
        half: {
            name: questions_of(
                rows.shard(2, place), tokenizer, max_length=None, max_examples=None, seed=0, name=f"{half} {name}"
            )
            for name, rows in drawn.items()
        }
        for place, half in enumerate(("validation", "test"))
    }
    base, twin = load("base"), load("retrained")
    attribution = attribute_experts(
        base, forget, processing_class=tokenizer, score=args.score, retain_dataset=halves["train"], seed=0
    )
    experts = attribution.top(1)
    if experts[0][0] == 0 and "npo, offload_prefix" in args.rows:
        raise ValueError(
            f"--score {args.score} chooses the expert {experts[0]}: no layer is below it that offload_prefix could "
            "take away; choose another --score, or leave the row out of --rows"
        )
    scores = {half: rouge(twin, questions, tokenizer, args) for half, questions in asked.items()}
    return Ground(forget, halves["train"], asked, tokenizer, experts, scores)


def load(name: str) -> Any:
    """One of the shipped models, fresh from disk, in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(cast(Any, name)), dtype="float32")
    return model.to(torch.accelerator.current_accelerator() or "cpu")


def rouge(model: Any, asked: dict[str, Questions], tokenizer: Any, args: LossesArguments) -> Scores:
    """Mean ROUGE-L recall of greedy answers, by set."""
    model.eval()
    return {
        name: fmean(
            rouge_l_recall(
                greedy_answers(
                    model, questions.prompts, tokenizer=tokenizer, max_new_tokens=args.max_new_tokens, batch_size=64
                ),
                questions.references,
            )
        )
        for name, questions in asked.items()
    }


class KeepAdapters(TrainerCallback):
    """The trained weights at each look."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.looks: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep them if it is time."""
        if state.global_step % self.every == 0:
            self.looks[state.global_step] = {n: p.detach().clone() for n, p in trained(model).items()}


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained weights by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def clock() -> float:
    """Seconds; on a CPU those of this process alone, which others on the machine do not lengthen."""
    return time.perf_counter() if torch.accelerator.is_available() else time.process_time()


def unlearn(ground: Ground, args: LossesArguments, row: str, rate: float, seed: int) -> Run:
    """One run: training, the sweep on the validation half, and the choice on the test half."""
    set_seed(seed)
    keep = KeepAdapters(args.look_every)
    trainer = UnlearningTrainer(
        model=load("base"),
        args=training_arguments(args, row=row, rate=rate, seed=seed),
        train_dataset=ground.forget,
        retain_dataset=ground.retain,
        processing_class=ground.tokenizer,
        peft_config=UOEConfig(target_experts=ground.experts),
        callbacks=[keep],
    )
    keep.looks[0] = {n: p.detach().clone() for n, p in trained(trainer.model).items()}  # where nothing else is left
    started, diverged = clock(), False
    try:
        trainer.train()
    except FloatingPointError as error:
        print(error)
        diverged = True
    seconds = round(clock() - started, 1)
    steps = [step for step in keep.looks if step > 0] or [0]
    validation = {
        (step, scale): at(trainer.model, keep.looks[step], scale, ground.asked["validation"], ground, args)
        for step, scale in product(steps, args.scales)
    }
    step, scale = best(validation, limit=ground.twin["validation"]["forget"] + args.margin)
    return Run(
        row=row,
        rate=rate,
        seed=seed,
        seconds=seconds,
        diverged=diverged,
        swept=[[*key, round(s["forget"], 4), round(s["retain"], 4)] for key, s in validation.items()],
        step=step,
        scale=scale,
        validation=validation[step, scale],
        test=at(trainer.model, keep.looks[step], scale, ground.asked["test"], ground, args),
    )


@torch.no_grad()
def at(
    model: Any,
    weights: dict[str, torch.Tensor],
    scale: float,
    asked: dict[str, Questions],
    ground: Ground,
    args: LossesArguments,
) -> Scores:
    """Scores of an adapter as it was at a look, at a scale."""
    for name, parameter in trained(model).items():
        parameter.copy_(weights[name])
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", scale)
    return rouge(model, asked, ground.tokenizer, args)


def best(scores: dict[Any, Scores], *, limit: float) -> Any:
    """What keeps most within the forget limit; where nothing is within it, what forgets most."""
    within = {key: s for key, s in scores.items() if s["forget"] <= limit}
    if within:
        return max(within, key=lambda key: (within[key]["retain"], -within[key]["forget"]))
    return min(scores, key=lambda key: (scores[key]["forget"], -scores[key]["retain"]))


def training_arguments(args: LossesArguments, *, row: str, rate: float, seed: int) -> UnlearningConfig:
    """The trainer's arguments: alike for all rows but for what the row is about."""
    return UnlearningConfig(
        output_dir=str(args.output_dir / "training"),
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        retain_loss="nll",
        retain_weight=args.retain_weight,
        anchor_weight=args.anchor_weight,
        log_routing=False,
        logging_steps=args.steps,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **ROWS[row],
    )


def table(ground: Ground, args: LossesArguments, runs: Sequence[Run]) -> str:
    """Markdown: of each row what its seeds chose, and the scores on the test half, mean ± deviation."""
    twin = ground.twin["test"]
    lines = [
        f"Expert {ground.experts[0]} (`{args.score}`), {args.steps} steps, rates {args.rates}; test half of the twin: "
        f"forget {twin['forget']:.3f}, retain {twin['retain']:.3f}.\n",
        "| row | forget | retain | rate, step, scale by seed | CPU s of a run |",
        "|---|---|---|---|---|",
    ]
    limit = ground.twin["validation"]["forget"] + args.margin
    for row in args.rows:
        own = [run for run in runs if run.row == row and run.seed in args.seeds and run.rate in args.rates]
        if not own:
            continue
        by_seed = {
            seed: {r.key: r for r in own if r.seed == seed} for seed in args.seeds if any(r.seed == seed for r in own)
        }
        chosen = [of[best({key: r.validation for key, r in of.items()}, limit=limit)] for of in by_seed.values()]
        star = "" if all(run.validation["forget"] <= limit for run in chosen) else " *"
        settings = "; ".join(f"{run.rate:g}, {run.step}, {run.scale:g}" for run in chosen)
        cells = [spread([run.test[name] for run in chosen]) for name in ("forget", "retain")]
        lines.append(f"| {row}{star} | {' | '.join(cells)} | {settings} | {fmean(r.seconds for r in own):.0f} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean, and the deviation over seeds where there are several."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
