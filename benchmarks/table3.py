"""The comparison of Table 3 of https://arxiv.org/abs/2411.18797: every loss with every choice of what is trained.

    python benchmarks/table3.py [--output_dir outputs/table3] [--minutes 60] [--seeds 0 1 2]

Trained: all parameters; LoRA on attention and dense layers; the experts of each layer that together hold a share p of
the affinity, as in ESFT (https://arxiv.org/abs/2407.01906); a random expert with its router; the expert that the gate
or the contrast chooses, with its router; and the contrast's best experts of each layer, with their routers.

One budget of steps and rows, one weight of each loss and equally many learning rates for all. Forget rows, and retain
rows that training has not seen, are asked in two halves. The *validation* half chooses rate, step and strength: the
model is `base + strength * (trained - base)`, which is an adapter's scale, and for full training the interpolation with
the base. What counts is the best retain ROUGE-L where forget ROUGE-L *and* answer probability are at or below the
retrained twin's + `margin`. The *test* half is reported, and beside it what is left of the chosen model's forgetting
after all its weights relearned other forget rows (24 steps, the maximum along the way), and after rounding to int4.
The runs of the first seed choose a cell's rate; further seeds are run at that one alone, with the prefix cache where
the trainer finds that it can be used.

Without options this is the shipped testbed, which takes about 20 seconds a run on one CPU core. Any model and sets will
do: `--model_name_or_path X --retrained_model T --forget_dataset F --retain_dataset R`, and `--rate_factor 0.1`
multiplies all rates. Every run is appended to `runs.jsonl` and not repeated, so that a benchmark that was stopped goes
on where it was; `--minutes 0` only writes tables and picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftConfig, get_peft_model
from table3_report import Limits, Look, Run, Table, best_look, cells_of, write_report
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import ExpertAttribution, UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.cli.loading import load_rows
from uoe_peft.data.alternatives import load_idk_answers
from uoe_peft.evaluation.attacks import quantization, relearning
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.likelihood import score_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, is_refusal, load_facts

NPO = {"forget_loss": "npo", "beta": 0.05, "retain_loss": "nll", "retain_weight": 8.0}
LOSSES: dict[str, dict[str, Any]] = {
    "NPO + refusals": {**NPO, "alternative_weight": 1.0},
    "NPO": NPO,
    "GDiff": {"forget_loss": "grad_ascent", "retain_loss": "nll"},
    "RMU": {"forget_loss": "rmu", "retain_loss": "embed_diff", "retain_weight": 30.0},
    "GA": {"forget_loss": "grad_ascent", "retain_loss": "none"},
}
# By loss: all parameters, LoRA, experts; the first is what pilots or earlier tables found, the second its neighbour.
RATES: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "NPO + refusals": ((1e-3, 3e-4), (3e-3, 1e-2), (5e-3, 2e-3)),
    "NPO": ((1e-3, 3e-4), (3e-3, 1e-2), (5e-3, 2e-3)),
    "GDiff": ((3e-4, 1e-3), (1e-3, 3e-3), (1e-3, 3e-3)),
    "RMU": ((1e-3, 3e-4), (3e-3, 1e-2), (3e-3, 1e-2)),
    "GA": ((1e-4, 3e-5), (1e-3, 3e-4), (1e-3, 3e-4)),
}
UOE_MANY = "UOE, 16 experts"
PARTS = ("all", "LoRA", "ESFT", "random expert", "UOE gate", "UOE contrast", UOE_MANY)
EXPERTS_A_LAYER = 4  # of UOE_MANY: 16 in the 4 layers of the testbed
MAY_CHANGE = ("output_dir", "minutes", "seeds", "losses", "parts", "num_rates")


@dataclass
class Table3Arguments:
    """Which model and sets, how long, how often."""

    output_dir: Path = field(default=Path("outputs/table3"), metadata={"help": "Where runs, tables and picture go."})
    minutes: float = field(default=120.0, metadata={"help": "No run begins after this; start again to go on."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training and of the random expert."})
    losses: list[str] = field(default_factory=lambda: list(LOSSES), metadata={"help": "Columns of the table."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "What is trained."})
    num_rates: int = field(default=2, metadata={"help": "Learning rates tried, of two."})
    rate_factor: float = field(default=1.0, metadata={"help": "On all learning rates, for other models."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "None: the shipped testbed."})
    retrained_model: str | None = field(default=None, metadata={"help": "Twin that never saw the forget set."})
    forget_dataset: str | None = field(default=None, metadata={"help": "File, folder or name on the Hub."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise; half of it is held out."})
    dtype: str = field(default="float32", metadata={"help": "Of the models."})
    margin: float = field(default=0.05, metadata={"help": "Above the twin's forget ROUGE-L and probability."})
    steps: int = field(default=120, metadata={"help": "Of every run; the learning rate falls linearly to 0."})
    looks: list[int] = field(default_factory=lambda: [15, 40, 80, 120], metadata={"help": "Steps to choose from."})
    strengths: list[float] = field(
        default_factory=lambda: [1.0, 0.85, 0.7, 0.55], metadata={"help": "Tried in this order, until a limit breaks."}
    )
    batch_size: int = field(default=8, metadata={"help": "Forget rows a step, and as many retain rows."})
    num_validation: list[int] = field(default_factory=lambda: [40, 60], metadata={"help": "Forget, retain rows asked."})
    num_test: list[int] = field(default_factory=lambda: [60, 120], metadata={"help": "The same of the test half."})
    num_relearned: int = field(default=40, metadata={"help": "Rows of the validation half that are relearned."})
    max_new_tokens: int = field(default=48, metadata={"help": "Where an answer is cut."})
    esft_share: float = field(default=0.2, metadata={"help": "Affinity p that ESFT's experts hold in each layer."})


@dataclass(frozen=True)
class Ground:
    """What all runs share; `asked` by half and role."""

    args: Table3Arguments
    base: str
    forget: Dataset
    retain: Dataset
    relearned: Dataset
    asked: dict[str, dict[str, Questions]]
    attributions: dict[str, ExpertAttribution]
    tokenizer: Any
    limits: Limits


def main() -> None:
    """Run what has not been run, then write tables and picture."""
    (args,) = HfArgumentParser(Table3Arguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)  # a second one gains little on so small a model, and costs much on a busy machine
    args.output_dir.mkdir(parents=True, exist_ok=True)
    check_settings(args)
    path, started = args.output_dir / "runs.jsonl", time.perf_counter()
    runs = [Run.from_dict(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    done = {run.key for run in runs}
    ground, references = prepare(args)
    for key in planned(args, runs):
        if key in done:
            continue
        if time.perf_counter() - started > args.minutes * 60:
            print(f"{args.minutes} minutes are over; start again to go on")
            break
        loss, part, _, seed = key
        rivals = [run.merit for run in runs if (run.loss, run.part, run.seed) == (loss, part, seed)]
        runs.append(unlearn(ground, *key, beats=max(rivals, default=None)))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(runs[-1])) + "\n")
        print(runs[-1].summary(), flush=True)
    cells = cells_of(runs, first_seed=args.seeds[0])
    write_report(args.output_dir, runs, Table(cells, references, ground.limits, args.losses, args.parts))


def check_settings(args: Table3Arguments) -> None:
    """Write what all runs must have in common; or compare with what is written, so that no table mixes two."""
    settings = {name: value for name, value in asdict(args).items() if name not in MAY_CHANGE}
    settings |= {"losses": LOSSES, "experts_a_layer": EXPERTS_A_LAYER}
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
    first, *further = args.seeds
    for place, loss, part in product(range(args.num_rates), args.losses, args.parts):
        yield loss, part, RATES[loss][{"all": 0, "LoRA": 1}.get(part, 2)][place] * args.rate_factor, first
    cells = cells_of(runs, first_seed=first)
    for seed, loss, part in product(further, args.losses, args.parts):
        yield loss, part, cells[loss, part].rate, seed


def prepare(args: Table3Arguments) -> tuple[Ground, dict[str, dict[str, float]]]:
    """What all runs share; and the scores of base and twin on the test half."""
    base, twin, forget, everything = sources(args)
    tokenizer = AutoTokenizer.from_pretrained(base)
    halves = everything.train_test_split(test_size=0.5, seed=0)
    asked_of = {
        "forget": forget.train_test_split(test_size=0.5, seed=0),
        "retain": halves["test"].train_test_split(test_size=0.5, seed=0),
    }
    asked = {
        half: {
            role: questions_of(asked_of[role][split], tokenizer, max_length=None, max_examples=n, seed=0, name=role)
            for role, n in zip(asked_of, numbers, strict=True)
        }
        for half, split, numbers in (("validation", "train", args.num_validation), ("test", "test", args.num_test))
    }
    attributions = {
        score: attribute_experts(
            load(base, args.dtype),
            forget,
            processing_class=tokenizer,
            score=score,
            retain_dataset=halves["train"],
            seed=0,
            show_progress=False,
        )
        for score in ("gate", "contrast")
    }
    relearned = asked_of["forget"]["train"].select(range(min(args.num_relearned, len(asked_of["forget"]["train"]))))
    # A ground without limits yet, to measure the twin that sets them.
    bare = Ground(args, base, forget, halves["train"], relearned, asked, attributions, tokenizer, Limits(0.0, 0.0))
    model = load(twin, args.dtype)
    twins = [scores(bare, model, half) for half in asked]
    limits = Limits(*(fmean(own[name] for own in twins) + args.margin for name in ("forget", "probability")))
    ground = Ground(args, base, forget, halves["train"], relearned, asked, attributions, tokenizer, limits)
    references = {"base": scores(bare, load(base, args.dtype), "test"), "retrained": tested(ground, model)}
    tops = {score: attribution.top(1) for score, attribution in attributions.items()}
    print(f"{tops}\n{references}\n{limits}", flush=True)
    return ground, references


def sources(args: Table3Arguments) -> tuple[str, str, Dataset, Dataset]:
    """Names of base and twin; the forget set and all else that the base knows.

    Raises:
        ValueError: A model of one's own comes without its twin or sets.
    """
    if args.model_name_or_path is None:
        others = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC])
        return str(checkpoint_path("base")), str(checkpoint_path("retrained")), load_facts([FORGET_TOPIC]), others
    if not (args.retrained_model and args.forget_dataset and args.retain_dataset):
        raise ValueError(
            "a model of your own needs --retrained_model, which says what counts as forgotten, and --forget_dataset "
            "and --retain_dataset"
        )
    forget, everything = load_rows(args.forget_dataset), load_rows(args.retain_dataset)
    return args.model_name_or_path, args.retrained_model, forget, everything


def load(name: str, dtype: str) -> Any:
    """A model, fresh from disk, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(torch.accelerator.current_accelerator() or "cpu").eval()


@cache
def base_weights(name: str, dtype: str) -> dict[str, torch.Tensor]:
    """The weights of the base model; not to be changed."""
    return dict(load(name, dtype).state_dict())


def ask(ground: Ground, model: Any, half: str, role: str) -> list[str]:
    """Greedy answers to the questions of a half and role."""
    return greedy_answers(
        model,
        ground.asked[half][role].prompts,
        tokenizer=ground.tokenizer,
        max_new_tokens=ground.args.max_new_tokens,
        batch_size=128,
        desc=role,
    )


def scores(ground: Ground, model: Any, half: str) -> dict[str, float]:
    """ROUGE-L of each role; of forget rows probability and share of refusals; of retain rows the worst topic's."""
    asked, answers = ground.asked[half], {role: ask(ground, model, half, role) for role in ("forget", "retain")}
    rouge = {role: rouge_l_recall(answers[role], asked[role].references) for role in answers}
    tokens = score_answers(model, asked["forget"].examples, batch_size=64, desc="forget")
    refusals = {text.strip() for text in load_idk_answers()}
    found = {role: fmean(values) for role, values in rouge.items()}
    found["probability"] = fmean(float(own.log_probs.mean().exp()) for own in tokens)
    found["refusals"] = fmean(is_refusal(answer) or answer in refusals for answer in answers["forget"])
    by_topic: dict[Any, list[float]] = {}
    for place, value in zip(asked["retain"].asked, rouge["retain"], strict=True):
        by_topic.setdefault(asked["retain"].columns[place].get("topic"), []).append(value)
    if None not in by_topic:
        found["worst topic"] = min(map(fmean, by_topic.values()))
    return found


def tested(ground: Ground, model: Any) -> dict[str, float]:
    """The scores of the test half; and those of copies that relearned other forget rows, or were rounded to int4."""

    def rouge(attacked: Any, *, roles: Sequence[str]) -> dict[str, float]:
        own = ground.asked["test"]
        return {
            role: fmean(rouge_l_recall(ask(ground, attacked, "test", role), own[role].references)) for role in roles
        }

    before = scores(ground, model, "test")
    relearned = relearning(
        model,
        ground.relearned,
        processing_class=ground.tokenizer,
        score=lambda attacked, **_: rouge(attacked, roles=["forget"]),
        steps=(6, 12, 18, 24),
        learning_rate=2e-4,
        batch_size=8,
        before={"forget": before["forget"]},
    )
    rounded = quantization(
        model,
        score=lambda attacked, **_: rouge(attacked, roles=["forget", "retain"]),
        bits=4,
        group_size=64,
        before=before,
    )
    attacks = {f"int4 {role}": rounded.after[role] for role in ("forget", "retain")}
    return {**before, "relearned": relearned.after["forget"], **attacks}


def clock() -> float:
    """Seconds; on a CPU those of this process alone, which others on the machine do not lengthen."""
    return time.perf_counter() if torch.accelerator.is_available() else time.process_time()


class Snapshots(TrainerCallback):
    """Copies of what is trained, by step."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps
        self.trained: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy if it is time, and if all is finite."""
        if state.global_step in self.steps:
            copied = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            if all(bool(torch.isfinite(p).all()) for p in copied.values()):
                self.trained[state.global_step] = copied


def unlearn(ground: Ground, loss: str, part: str, rate: float, seed: int, *, beats: tuple[bool, float] | None) -> Run:
    """One run, from the base model: its looks, and the best of them on the test half if its merit is above `beats`."""
    set_seed(seed)
    targets = target_experts(ground, part=part, seed=seed)
    snapshots = Snapshots(ground.args.looks)
    arguments = training_arguments(ground, loss=loss, part=part, rate=rate, seed=seed)
    trainer = UnlearningTrainer(
        model=load(ground.base, ground.args.dtype),
        args=arguments,
        train_dataset=ground.forget,
        retain_dataset=ground.retain,
        processing_class=ground.tokenizer,
        peft_config=adapter(part, targets),
        callbacks=[snapshots],
    )
    started = clock()
    try:
        trainer.train()
    except FloatingPointError as error:
        print(error)
    seconds = clock() - started
    trained = [p for p in trainer.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
    weights = {step: merged(ground, part, targets, own) for step, own in snapshots.trained.items()}
    looks = look(ground, weights)
    chosen = best_look(looks, ground.limits)
    run = Run(
        loss=loss,
        part=part,
        rate=rate,
        seed=seed,
        looks=looks,
        chosen=chosen,
        reached=ground.limits.met(chosen),
        test={},
        seconds=round(seconds, 1),
        cached=arguments.prefix_cache is not False,
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in load(ground.base, ground.args.dtype).parameters()),
        bytes=sum(p.numel() * p.element_size() for p in trained),
        experts=[list(pair) for pair in targets],
    )
    if beats is not None and run.merit <= beats:
        return run
    model = strengthened(ground, weights.get(chosen.step, {}), chosen.strength)
    return replace(run, test=rounded(tested(ground, model)))


def merged(
    ground: Ground, part: str, targets: list[tuple[int, int]], trained: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All weights of a model with what was trained in place: where it is an adapter, merged into a fresh base."""
    model, config = load(ground.base, ground.args.dtype), adapter(part, targets)
    wrapped: Any = model if config is None else get_peft_model(model, config)
    parameters = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    return dict((model if config is None else wrapped.merge_and_unload()).state_dict())


def strengthened(ground: Ground, weights: Mapping[str, torch.Tensor], strength: float) -> Any:
    """A model with `base + strength * (weights - base)`."""
    model = load(ground.base, ground.args.dtype)
    base = base_weights(ground.base, ground.args.dtype)
    model.load_state_dict({name: base[name].lerp(weights.get(name, base[name]), strength) for name in base})
    return model


def look(ground: Ground, weights: Mapping[int, Mapping[str, torch.Tensor]]) -> list[Look]:
    """Looks at each step at falling strengths until a limit breaks; the base model is the first."""
    looks = [look_at(ground, {}, 0, 0.0)]
    for step, own in weights.items():
        for strength in ground.args.strengths:
            looks.append(look_at(ground, own, step, strength))
            if not ground.limits.met(looks[-1]):
                break
    return looks


def look_at(ground: Ground, weights: Mapping[str, torch.Tensor], step: int, strength: float) -> Look:
    """One look at the validation half."""
    found = rounded(scores(ground, strengthened(ground, weights, strength), "validation"))
    return Look(step, strength, found["forget"], found["retain"], found["probability"])


def rounded(found: Mapping[str, float]) -> dict[str, float]:
    """Scores with four places, for a file that people read."""
    return {name: round(value, 4) for name, value in found.items()}


def target_experts(ground: Ground, *, part: str, seed: int) -> list[tuple[int, int]]:
    """The experts that a part trains; none where it trains no expert by itself."""
    gate, contrast = ground.attributions["gate"], ground.attributions["contrast"]
    match part:
        case "all" | "LoRA":
            return []
        case "random expert":
            affinity = torch.rand(gate.affinity.shape, generator=torch.Generator().manual_seed(seed))
            row, expert_idx = divmod(int(affinity.argmax()), affinity.shape[1])
            return [(gate.layer_indices[row], expert_idx)]
        case "ESFT":
            return by_layer(gate, lambda row: until_share(row, ground.args.esft_share))
        case "UOE gate":
            return gate.top(1)
        case "UOE contrast":
            return contrast.top(1)
        case _:
            return by_layer(contrast, lambda row: row.topk(min(EXPERTS_A_LAYER, len(row))).indices.tolist())


def by_layer(attribution: ExpertAttribution, choose: Callable[[torch.Tensor], list[int]]) -> list[tuple[int, int]]:
    """The experts that are chosen of each row of an attribution."""
    rows = zip(attribution.layer_indices, attribution.affinity, strict=True)
    return [(layer_idx, expert_idx) for layer_idx, row in rows for expert_idx in choose(row)]


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


def training_arguments(ground: Ground, *, loss: str, part: str, rate: float, seed: int) -> UnlearningConfig:
    """The trainer's arguments."""
    args, own = ground.args, dict(LOSSES[loss])
    if loss == "RMU" and part in ("all", "LoRA", "ESFT"):  # the others are steered where they are edited
        own["rmu_layer"] = ground.attributions["contrast"].top(1)[0][0]
    return UnlearningConfig(
        output_dir=str(args.output_dir / "training"),
        learning_rate=rate,
        lr_scheduler_type="linear",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        anchor_weight=0.0
        if part == "ESFT"
        else 1.0,  # adapters that train a router are held to it, all others have none
        log_routing=False,
        prefix_cache=False if seed == args.seeds[0] else "auto",  # the first seed's seconds are of the whole model
        logging_steps=args.steps,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **own,
    )


if __name__ == "__main__":
    main()
