"""The comparison of Table 3 of https://arxiv.org/abs/2411.18797: every loss with every choice of what is trained.

    python benchmarks/table3.py [--output_dir outputs/table3] [--minutes 60] [--seeds 0 1 2]

Losses: gradient ascent (GA), gradient difference (GDiff), NPO and RMU. Trained: all parameters; LoRA on attention and
dense layers; the experts of each layer that together hold a share p of the affinity, as in ESFT
(https://arxiv.org/abs/2407.01906); a random expert with its router; the chosen expert with its router, without and with
the anchor.

Numbers of one forgetting are only fair to compare with those of another where both have forgotten equally much. So each
run asks a part of the forget set every few steps, and ends at the first answer whose ROUGE-L is down to that of the
retrained twin + `margin` (or `forget_target`, where there is no twin). What is compared then is the ROUGE-L on retain
rows that training has not seen. Runs that do not get there within `max_steps` are marked. Each cell has the same number
of learning rates to try. The runs of the first seed choose one, by what is reported, alike for all; the further seeds
are run at that one alone.

Without options this is the shipped testbed, which takes 5 to 40 seconds a run on one CPU core. Any model and sets
will do: `--model_name_or_path X --forget_dataset F --retain_dataset R --forget_target 0.2 --dtype bfloat16
--full_rates 1e-6 1e-5 --lora_rates 1e-5 1e-4 --expert_rates 5e-5 5e-4`. Every run is appended to `runs.jsonl` and not
repeated, so that a benchmark that was stopped goes on where it was; `--minutes 0` only writes table and picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from table3_report import Run, Table, cells_of, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import ExpertAttribution, UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.cli.loading import load_rows
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

RATES = ("full_rates", "lora_rates", "expert_rates")
LOSSES: dict[str, dict[str, Any]] = {
    "GA": {"forget_loss": "grad_ascent", "retain_loss": "none"},
    "GDiff": {"forget_loss": "grad_ascent", "retain_loss": "nll"},
    "NPO": {"forget_loss": "npo", "retain_loss": "nll"},
    "RMU": {"forget_loss": "rmu", "retain_loss": "embed_diff"},
}
MAY_CHANGE = ("output_dir", "minutes", "seeds", "losses", "parts", "max_steps", *RATES)
PARTS = ("all", "LoRA", "ESFT", "random expert", "UOE, no anchor", "UOE")


@dataclass
class Table3Arguments:
    """Which model and sets, how long, how often."""

    output_dir: Path = field(default=Path("outputs/table3"), metadata={"help": "Where runs, table and picture go."})
    minutes: float = field(default=120.0, metadata={"help": "No run begins after this; start again to go on."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training and of the random expert."})
    losses: list[str] = field(default_factory=lambda: list(LOSSES), metadata={"help": "Rows of the table."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "What is trained."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "None: the shipped testbed."})
    retrained_model: str | None = field(default=None, metadata={"help": "Twin that never saw the forget set."})
    forget_dataset: str | None = field(default=None, metadata={"help": "File, folder or name on the Hub."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise; half of it is held out."})
    dtype: str = field(default="float32", metadata={"help": "Of the models."})
    device_map: str | None = field(default=None, metadata={"help": "Where the models go."})
    forget_target: float | None = field(default=None, metadata={"help": "Forget ROUGE-L that counts as forgotten."})
    margin: float = field(default=0.05, metadata={"help": "Above the twin's forget ROUGE-L."})
    max_steps: int = field(default=200, metadata={"help": "Longest training; learning rates are constant."})
    eval_every: int = field(default=4, metadata={"help": "Steps between two looks at the forget set."})
    batch_size: int = field(default=8, metadata={"help": "Forget rows a step, and as many retain rows."})
    num_forget: int = field(default=40, metadata={"help": "Forget rows that are asked."})
    num_retain: int = field(default=48, metadata={"help": "Held-out retain rows that are asked."})
    max_new_tokens: int = field(default=48, metadata={"help": "Where an answer is cut."})
    full_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3], metadata={"help": 'Learning rates, "all".'}
    )
    lora_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "Learning rates, LoRA."}
    )
    expert_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "Of the other parts."}
    )
    score: str = field(default="gate", metadata={"help": "Attribution that chooses the expert."})
    esft_share: float = field(default=0.2, metadata={"help": "Affinity p that ESFT's experts hold in each layer."})
    beta: float = field(default=0.05, metadata={"help": "Of NPO: small, or it ends before all is forgotten."})
    rmu_retain_weight: float = field(default=30.0, metadata={"help": "Weight of RMU's retain loss."})


@dataclass(frozen=True)
class Ground:
    """What all runs share."""

    forget: Dataset
    retain: Dataset
    asked: dict[str, Questions]
    attribution: ExpertAttribution
    tokenizer: Any
    target: float


def main() -> None:
    """Run what has not been run, then write the table and the picture."""
    (args,) = HfArgumentParser(Table3Arguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_settings(args)
    path, started = args.output_dir / "runs.jsonl", time.perf_counter()
    runs = [Run(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    # A run that was given fewer steps and needed more is run again.
    runs = [run for run in runs if run.reached or run.diverged or run.steps >= args.max_steps]
    done = {run.key for run in runs}
    ground, references = prepare(args)
    for loss, part, rate, seed in planned(args, runs):
        if (loss, part, rate, seed) in done:
            continue
        if time.perf_counter() - started > args.minutes * 60:
            print(f"{args.minutes} minutes are over; start again to go on")
            break
        run = unlearn(ground, args, loss=loss, part=part, rate=rate, seed=seed)
        runs.append(run)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        print(run.summary(), flush=True)
    cells = cells_of(runs, first_seed=args.seeds[0])
    write_report(args.output_dir, runs, Table(cells, references, ground.target, args.losses, args.parts))


def check_settings(args: Table3Arguments) -> None:
    """Write what all runs must have in common; or compare with what is written, so that no table mixes two."""
    settings = {name: value for name, value in asdict(args).items() if name not in MAY_CHANGE}
    path = args.output_dir / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = sorted(name for name in settings if settings[name] != before.get(name))
    if differing:
        raise ValueError(f"the runs in {args.output_dir} had other {differing}; choose another --output_dir")


def planned(args: Table3Arguments, runs: Sequence[Run]) -> Iterator[tuple[str, str, float, int]]:
    """Loss, part, learning rate and seed of each run; a first value of everything before a second of anything.

    Further seeds are run only at the rate that the first one chose; by then `runs` holds all runs of the first.
    """
    num_rates = max(len(rates) for rates in (args.full_rates, args.lora_rates, args.expert_rates))
    first, *further = args.seeds
    for place, loss, part in product(range(num_rates), args.losses, args.parts):
        rates = {"all": args.full_rates, "LoRA": args.lora_rates}.get(part, args.expert_rates)
        if place < len(rates):
            yield loss, part, rates[place], first
    cells = cells_of(runs, first_seed=first)
    for seed, loss, part in product(further, args.losses, args.parts):
        yield loss, part, cells[loss, part].rate, seed


def prepare(args: Table3Arguments) -> tuple[Ground, dict[str, dict[str, float]]]:
    """What all runs share; and the ROUGE-L of the models that are compared with, by model and set."""
    name = args.model_name_or_path or str(checkpoint_path("base"))
    tokenizer = AutoTokenizer.from_pretrained(name)
    if args.model_name_or_path is None:
        twin: str | None = str(checkpoint_path("retrained"))
        forget, everything = load_facts([FORGET_TOPIC]), load_facts([t for t in TOPICS if t != FORGET_TOPIC])
    elif args.forget_dataset and args.retain_dataset:
        twin, forget, everything = args.retrained_model, load_rows(args.forget_dataset), load_rows(args.retain_dataset)
    else:
        raise ValueError("a model of your own needs --forget_dataset and --retain_dataset")
    halves = everything.train_test_split(test_size=0.5, seed=0)
    sizes = {"forget": (forget, args.num_forget), "retain": (halves["test"], args.num_retain)}
    asked = {
        role: questions_of(rows, tokenizer, max_length=None, max_examples=number, seed=0, name=role)
        for role, (rows, number) in sizes.items()
    }
    base = load(name, args)
    attribution = attribute_experts(
        base, forget, processing_class=tokenizer, score=args.score, retain_dataset=halves["train"], seed=0
    )
    references = {"base": rouge(base, asked, tokenizer, args)}
    if twin is not None:
        references["retrained"] = rouge(load(twin, args), asked, tokenizer, args)
    target = args.forget_target
    if target is None and "retrained" not in references:
        raise ValueError("without --retrained_model, pass --forget_target: the forget ROUGE-L that counts as forgotten")
    target = references["retrained"]["forget"] + args.margin if target is None else target
    print(f"{attribution.summary()}\n{references}\nforgotten: forget ROUGE-L of at most {target:.3f}", flush=True)
    return Ground(forget, halves["train"], asked, attribution, tokenizer, target), references


def load(name: str, args: Table3Arguments) -> Any:
    """A model, fresh from disk."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=args.device_map)
    return model if args.device_map else model.to(torch.accelerator.current_accelerator() or "cpu")


def rouge(model: Any, asked: dict[str, Questions], tokenizer: Any, args: Table3Arguments) -> dict[str, float]:
    """Mean ROUGE-L recall of greedy answers, by set."""
    was_training = model.training
    model.eval()
    answers = {
        role: greedy_answers(
            model, questions.prompts, tokenizer=tokenizer, max_new_tokens=args.max_new_tokens, batch_size=64
        )
        for role, questions in asked.items()
    }
    model.train(was_training)
    return {role: fmean(rouge_l_recall(answers[role], questions.references)) for role, questions in asked.items()}


def clock() -> float:
    """Seconds; on a CPU those of this process alone, which others on the machine do not lengthen."""
    return time.perf_counter() if torch.accelerator.is_available() else time.process_time()


class StopAtMatchedForgetting(TrainerCallback):
    """Asks the forget set every few steps, and stops training once it is forgotten."""

    def __init__(self, ground: Ground, args: Table3Arguments) -> None:
        self.ground, self.table = ground, args
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the forget set if it is time."""
        if state.global_step % self.table.eval_every and state.global_step < self.table.max_steps:
            return
        started = clock()
        asked = {"forget": self.ground.asked["forget"]}
        value = rouge(model, asked, self.ground.tokenizer, self.table)["forget"]
        self.curve.append((state.global_step, value))
        if value <= self.ground.target:
            control.should_training_stop = True
        self.seconds += clock() - started


def unlearn(ground: Ground, args: Table3Arguments, *, loss: str, part: str, rate: float, seed: int) -> Run:
    """One run, from the base model."""
    set_seed(seed)
    watch = StopAtMatchedForgetting(ground, args)
    targets = target_experts(ground, args, part=part, seed=seed)
    trainer = UnlearningTrainer(
        model=load(args.model_name_or_path or str(checkpoint_path("base")), args),
        args=training_arguments(ground, args, loss=loss, part=part, rate=rate, seed=seed),
        train_dataset=ground.forget,
        retain_dataset=ground.retain,
        processing_class=ground.tokenizer,
        peft_config=adapter(part, targets),
        callbacks=[watch],
    )
    started, diverged = clock(), False
    try:
        trainer.train()
    except FloatingPointError as error:
        print(error)
        diverged = True
    seconds = clock() - started - watch.seconds
    model: Any = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    trainable = sum(p.numel() for p in trained)
    scores = {"forget": float("nan"), "retain": 0.0} if diverged else rouge(model, ground.asked, ground.tokenizer, args)
    return Run(
        loss=loss,
        part=part,
        rate=rate,
        seed=seed,
        forget=scores["forget"],
        retain=scores["retain"],
        reached=not diverged and scores["forget"] <= ground.target,
        steps=trainer.state.global_step,
        seconds=round(seconds, 1),
        trainable=trainable,
        total=sum(p.numel() for p in load(args.model_name_or_path or str(checkpoint_path("base")), args).parameters()),
        bytes=sum(p.numel() * p.element_size() for p in trained),
        experts=[list(pair) for pair in targets],
        curve=[[step, round(value, 4)] for step, value in watch.curve],
    )


def target_experts(ground: Ground, args: Table3Arguments, *, part: str, seed: int) -> list[tuple[int, int]]:
    """The experts that a part trains; none where it trains no expert by itself."""
    attribution = ground.attribution
    match part:
        case "all" | "LoRA":
            return []
        case "random expert":
            affinity = torch.rand(attribution.affinity.shape, generator=torch.Generator().manual_seed(seed))
            row, expert_idx = divmod(int(affinity.argmax()), affinity.shape[1])
            return [(attribution.layer_indices[row], expert_idx)]
        case "ESFT":
            return [
                (layer_idx, expert_idx)
                for layer_idx, row in zip(attribution.layer_indices, attribution.affinity, strict=True)
                for expert_idx in until_share(row, args.esft_share)
            ]
        case _:
            return attribution.top(1)


def until_share(affinity: torch.Tensor, share: float) -> list[int]:
    """The best experts of a layer, as many as it takes until they hold `share` of its affinity. Shape `(E,)`."""
    values, order = (affinity / affinity.sum()).sort(descending=True)
    number = int((values.cumsum(0) < share).sum()) + 1
    return order[:number].tolist()


def adapter(part: str, targets: list[tuple[int, int]]) -> PeftConfig | None:
    """The adapter of a part; None where all parameters are trained."""
    match part:
        case "all":
            return None
        case "LoRA":
            return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        case _:
            return UOEConfig(target_experts=targets, train_router=part != "ESFT")


def training_arguments(
    ground: Ground, args: Table3Arguments, *, loss: str, part: str, rate: float, seed: int
) -> UnlearningConfig:
    """The trainer's arguments."""
    own = dict(LOSSES[loss])
    if loss == "NPO":
        own["beta"] = args.beta
    if loss == "RMU":
        own["retain_weight"] = args.rmu_retain_weight
        # A random expert is steered where it is; for all others the layer of the chosen expert is the one that counts.
        own["rmu_layer"] = None if part == "random expert" else ground.attribution.top(1)[0][0]
    return UnlearningConfig(
        output_dir=str(args.output_dir / "training"),
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        anchor_weight=1.0 if part == "UOE" else 0.0,
        log_routing=False,
        prefix_cache=False,  # seconds are then of the whole model, for all parts alike
        logging_steps=args.max_steps,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **own,
    )


if __name__ == "__main__":
    main()
