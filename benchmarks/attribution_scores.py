r"""Which expert each attribution score picks, and what unlearning that expert gives at matched forgetting.

    python benchmarks/attribution_scores.py [--cache_dir outputs/attribution_scores] [--minutes 45]
    python benchmarks/attribution_scores.py --no_stop_at_target --cache_dir outputs/attribution_scores_80
    python benchmarks/attribution_scores.py --data DIR --no_testbed --learning_rate 2e-3 --eval_every 4 \
        --cache_dir outputs/attribution_scores_tofu

Two grounds, one table each:

- testbed: the shipped model, with each of its seven topics in turn as what is to be forgotten. Its experts specialised
  by themselves.
- TOFU (https://arxiv.org/abs/2401.06121; DIR holds its `full.json`): a small model learns 50 authors, the last 5 are
  to be forgotten. How far one expert is made special for them, is a dial, tau; `tofu_model.py` says how.

All scores share loss, settings and seed. A run asks a part of the forget set every few steps and ends at the first
answer whose ROUGE-L recall is at or below a target: on the testbed that of the twin that never saw the forget topic
plus a margin (the shipped twin lacks one topic; its number stands for all), on TOFU a fixed one. What is compared then
is ROUGE-L on retain rows that training has not seen. Runs that do not get there within `max_steps` are marked and
reported as they ended. Scores that pick the same expert share one run.

The first answer below the target favours experts that forget slowly: their retain loss has had more steps to repair
what was damaged. `--no_stop_at_target` gives every run the same `max_steps` instead; the two readings belong together.

Picks, models and runs are kept in `cache_dir`: a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from datasets import Dataset
from tofu_model import load_tofu, tofu_model, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.attribution import AttributionWarning
from uoe_peft.attribution.scores import Score
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

SCORES: tuple[str, ...] = get_args(Score)
TOPIC_ORDER = (FORGET_TOPIC, *(topic for topic in TOPICS if topic != FORGET_TOPIC))


@dataclass
class ScoresArguments:
    """Grounds, unlearning and evaluation."""

    data: Path | None = field(default=None, metadata={"help": "Folder with TOFU's full.json; None: testbed only."})
    cache_dir: Path = field(default=Path("outputs/attribution_scores"), metadata={"help": "Picks, models and runs."})
    minutes: float = field(default=45.0, metadata={"help": "No run begins after this; start again to go on."})
    testbed: bool = field(default=True, metadata={"help": "Whether to run the testbed."})
    topics: list[str] = field(
        default_factory=lambda: list(TOPIC_ORDER),
        metadata={"help": "Topics of the testbed to forget, each by itself."},
    )
    taus: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.6], metadata={"help": "Domain dial of TOFU."})
    epochs: int = field(default=12, metadata={"help": "Passes over TOFU in pre-training."})
    dial_epochs: int = field(default=8, metadata={"help": "Passes that follow under each dial."})
    max_tokens: int = field(default=5_000, metadata={"help": "Sample of each set that attribution reads."})
    beta: float = field(default=0.05, metadata={"help": "Of NPO."})
    retain_weight: float = field(default=4.0, metadata={"help": "Of the retain loss, nll."})
    anchor_weight: float = field(default=1.0, metadata={"help": "Of the anchor, Eq. 3."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Of the unlearning, constant."})
    batch_size: int = field(default=8, metadata={"help": "Forget rows a step, and as many retain rows."})
    max_steps: int = field(default=80, metadata={"help": "Longest unlearning."})
    eval_every: int = field(default=8, metadata={"help": "Steps between two looks at the forget set."})
    stop_at_target: bool = field(default=True, metadata={"help": "End a run there; if not, all take max_steps."})
    margin: float = field(default=0.05, metadata={"help": "Testbed: target above the twin's forget ROUGE-L."})
    tofu_target: float = field(default=0.3, metadata={"help": "TOFU: forget ROUGE-L that counts as forgotten."})
    num_forget: int = field(default=40, metadata={"help": "Forget rows that are asked."})
    num_retain: int = field(default=60, metadata={"help": "Held-out retain rows that are asked."})
    max_new_tokens: int = field(default=64, metadata={"help": "Where an answer is cut."})
    seed: int = field(default=0, metadata={"help": "Of everything."})


@dataclass(frozen=True)
class Ground:
    """A model, what it is to forget, and when it counts as forgotten."""

    name: str
    base: Any
    tokenizer: Any
    forget: Dataset
    retain: Dataset  # what attribution and the retain loss see
    asked: dict[str, Questions]
    target: float
    seed: int  # of the random score: another draw on each ground


@dataclass(frozen=True)
class Pick:
    """What a score chose, and what the attribution itself warned of."""

    ground: str
    score: str
    expert: tuple[int, int]
    warned: list[str]
    seconds: float


@dataclass(frozen=True)
class Run:
    """One expert, unlearned."""

    ground: str
    expert: tuple[int, int]
    target: float
    base: dict[str, float]  # ROUGE-L recall before, by set
    forget: float
    retain: float
    reached: bool
    steps: int
    seconds: float
    curve: list[tuple[int, float]]


def main() -> None:
    """Pick and run what has not been yet, then print the tables."""
    (args,) = HfArgumentParser(ScoresArguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    started = time.perf_counter()
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    check_settings(args)
    picks = [Pick(**row) for row in read(args.cache_dir / "picks.jsonl")]
    runs = [Run(**row) for row in read(args.cache_dir / "runs.jsonl")]
    all_grounds = list(grounds(args))
    for ground in all_grounds:
        for score in SCORES:
            if not any((pick.ground, pick.score) == (ground.name, score) for pick in picks):
                picks.append(pick_expert(ground, args, score=score))
                append(args.cache_dir / "picks.jsonl", picks[-1])
    for ground in all_grounds:
        done = {run.expert for run in runs if run.ground == ground.name}
        wanted = dict.fromkeys(pick.expert for pick in picks if pick.ground == ground.name)
        for expert in wanted:
            if expert in done:
                continue
            if time.perf_counter() - started > args.minutes * 60:
                print(f"{args.minutes} minutes are over; start again to go on")
                break
            runs.append(unlearn(ground, args, expert=expert))
            append(args.cache_dir / "runs.jsonl", runs[-1])
    print_tables([ground.name for ground in all_grounds], picks, runs)


def check_settings(args: ScoresArguments) -> None:
    """Keep results of other settings apart.

    Raises:
        ValueError: `cache_dir` holds results of other settings.
    """
    free = ("data", "cache_dir", "minutes", "testbed", "topics", "taus")  # what is run, not how
    settings = {name: value for name, value in asdict(args).items() if name not in free}
    path = args.cache_dir / "settings.json"
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        changed = [name for name, value in settings.items() if before.get(name) != value]
        raise ValueError(f"{args.cache_dir} holds results with another {', '.join(changed)}; use another --cache_dir")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if there is no file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row | {"expert": tuple(row["expert"])} for row in rows]


def append(path: Path, row: Pick | Run) -> None:
    """Write a row to the end of a JSON-lines file, and show it."""
    line = json.dumps(asdict(row))
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def grounds(args: ScoresArguments) -> Iterator[Ground]:
    """Testbed, topic by topic, and TOFU, dial by dial; trains what is not in the cache."""
    if args.testbed:
        target = twin_recall(args) + args.margin
        for topic in args.topics:
            forget, others = load_facts([topic]), load_facts([other for other in TOPICS if other != topic])
            halves = others.train_test_split(test_size=0.5, seed=args.seed)
            sets = {"forget": forget, "retain": halves["train"], "held_out": halves["test"]}
            yield new_ground(
                topic, load("base"), testbed_tokenizer(), sets, args, target=target, place=TOPIC_ORDER.index(topic)
            )
    if args.data is not None:
        tofu = load_tofu(args.data, seed=args.seed)
        tokenizer = train_tokenizer(tofu.everything)
        sets = {"forget": tofu.forget, "retain": tofu.retain, "held_out": tofu.held_out}
        for tau in args.taus:
            base = tofu_model(
                tofu.everything,
                tokenizer,
                args.cache_dir,
                tau=tau,
                num_forget=len(tofu.forget),
                epochs=args.epochs,
                dial_epochs=args.dial_epochs,
                seed=args.seed,
            )
            yield new_ground(
                f"tau {tau:g}", base, tokenizer, sets, args, target=args.tofu_target, place=round(10 * tau)
            )


def new_ground(
    name: str, base: Any, tokenizer: Any, sets: dict[str, Dataset], args: ScoresArguments, *, target: float, place: int
) -> Ground:
    """A ground, its questions drawn."""
    numbers = {"forget": ("forget", args.num_forget), "retain": ("held_out", args.num_retain)}
    asked = {
        role: questions_of(sets[of], tokenizer, max_length=None, max_examples=number, seed=args.seed, name=of)
        for role, (of, number) in numbers.items()
    }
    return Ground(name, base, tokenizer, sets["forget"], sets["retain"], asked, target, seed=args.seed + place)


@cache
def load(name: Any) -> Any:
    """A model of the testbed; nobody changes it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=torch.float32).eval()


@cache
def testbed_tokenizer() -> Any:
    """The testbed's tokenizer."""
    return AutoTokenizer.from_pretrained(checkpoint_path("base"))


def twin_recall(args: ScoresArguments) -> float:
    """ROUGE-L recall, on the testbed's own forget topic, of the twin that never saw it."""
    tokenizer, facts = testbed_tokenizer(), load_facts([FORGET_TOPIC])
    asked = questions_of(
        facts, tokenizer, max_length=None, max_examples=args.num_forget, seed=args.seed, name=FORGET_TOPIC
    )
    return recall(load("retrained"), asked, tokenizer, args)


def recall(model: Any, asked: Questions, tokenizer: Any, args: ScoresArguments) -> float:
    """Mean ROUGE-L recall of greedy answers."""
    was_training = model.training
    model.eval()
    answers = greedy_answers(
        model, asked.prompts, tokenizer=tokenizer, max_new_tokens=args.max_new_tokens, batch_size=len(asked.prompts)
    )
    model.train(was_training)
    return fmean(rouge_l_recall(answers, asked.references))


def pick_expert(ground: Ground, args: ScoresArguments, *, score: Any) -> Pick:
    """The expert that a score ranks first."""
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AttributionWarning)
        attribution = attribute_experts(
            ground.base,
            ground.forget,
            processing_class=ground.tokenizer,
            score=score,
            retain_dataset=ground.retain,
            max_tokens=args.max_tokens,
            batch_size=50,
            seed=ground.seed if score == "random" else args.seed,
            show_progress=False,
        )
    warned = [warning.category.__name__ for warning in caught if issubclass(warning.category, AttributionWarning)]
    seconds = round(time.perf_counter() - started, 1)
    return Pick(ground=ground.name, score=score, expert=attribution.top(1)[0], warned=warned, seconds=seconds)


class StopWhenForgotten(TrainerCallback):
    """Asks the forget set every few steps, and stops training once it is forgotten."""

    def __init__(self, ground: Ground, args: ScoresArguments) -> None:
        self.ground, self.own = ground, args
        self.curve: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the forget set if it is time."""
        if state.global_step % self.own.eval_every and state.global_step < self.own.max_steps:
            return
        value = recall(model, self.ground.asked["forget"], self.ground.tokenizer, self.own)
        self.curve.append((state.global_step, round(value, 4)))
        if self.own.stop_at_target and value <= self.ground.target:
            control.should_training_stop = True


def unlearn(ground: Ground, args: ScoresArguments, *, expert: tuple[int, int]) -> Run:
    """Unlearn one expert and its router, until the forget set is forgotten or the steps are used up."""
    set_seed(args.seed)
    before = {role: recall(ground.base, asked, ground.tokenizer, args) for role, asked in ground.asked.items()}
    watch = StopWhenForgotten(ground, args)
    trainer = UnlearningTrainer(
        model=deepcopy(ground.base),
        args=UnlearningConfig(
            output_dir=str(args.cache_dir / "training"),
            forget_loss="npo",
            beta=args.beta,
            retain_loss="nll",
            retain_weight=args.retain_weight,
            anchor_weight=args.anchor_weight,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            prefix_cache=False,  # alike for all layers
            use_cpu=True,
            dataloader_pin_memory=False,
            log_routing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
        ),
        train_dataset=ground.forget,
        retain_dataset=ground.retain,
        processing_class=ground.tokenizer,
        peft_config=UOEConfig(target_experts=[expert]),
        callbacks=[watch],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    steps, forget = watch.curve[-1]
    return Run(
        ground=ground.name,
        expert=expert,
        target=round(ground.target, 4),
        base={role: round(value, 4) for role, value in before.items()},
        forget=forget,
        retain=round(recall(trainer.model, ground.asked["retain"], ground.tokenizer, args), 4),
        reached=forget <= ground.target,
        steps=steps,
        seconds=round(seconds, 1),
        curve=watch.curve,
    )


def print_tables(names: list[str], picks: list[Pick], runs: list[Run]) -> None:
    """One Markdown table for each ground: a row for each topic or dial, a column for each score."""
    by_expert = {(run.ground, run.expert): run for run in runs}
    chosen = {(pick.ground, pick.score): pick for pick in picks}
    for title, own in (
        ("testbed", [name for name in names if name in TOPICS]),
        ("TOFU", [name for name in names if name not in TOPICS]),
    ):
        if not own:
            continue
        print(f"\n| {title} | base | target | " + " | ".join(SCORES) + " |")
        print("|---" * (len(SCORES) + 3) + "|")
        for name in own:
            first = next((run for run in runs if run.ground == name), None)
            known = [""] * 2 if first is None else [_pair(**first.base), f"{first.target:.2f}"]
            cells = [cell(chosen[name, score], by_expert) for score in SCORES]
            print("| " + " | ".join([name, *known, *cells]) + " |")


def cell(pick: Pick, by_expert: dict[tuple[str, tuple[int, int]], Run]) -> str:
    """What a score picked, and what unlearning it gave: forget / retain ROUGE-L after so many steps."""
    layer_idx, expert_idx = pick.expert
    doubt = "?" if pick.warned else ""
    run = by_expert.get((pick.ground, pick.expert))
    if run is None:
        return f"L{layer_idx} e{expert_idx}{doubt}: not run"
    missed = "" if run.reached else "*"
    return f"L{layer_idx} e{expert_idx}{doubt}: {_pair(forget=run.forget, retain=run.retain)}{missed} ({run.steps})"


def _pair(*, forget: float, retain: float) -> str:
    return f"{forget:.2f} / {retain:.2f}"


if __name__ == "__main__":
    main()
