"""Does it pay to damp deltas where retain tokens are, and how far does one get without training?

    python benchmarks/projection.py [--output_dir outputs/projection] [--minutes 40] [--seeds 0 1]

The testbed, a fixed number of steps. Forget and retain rows are asked in two halves: the validation half chooses
learning rate, step and strength (scale of the adapter) of each cell, by the best retain ROUGE-L under the forget limit
(the retrained twin's + `margin`); the test half is reported. The twin's forget ROUGE-L is that of all asked rows.

- Losses: NPO with 4 times the retain loss, and gradient difference.
- Experts: the best by the gate, the best by the contrast, a random one.
- Variants: plain UOE; retain projection with rho 3, 1 and 0.1; the latter two also with P scaled, so that forget tokens
  see steps as large as without it; and with experts or router projected alone.
- "after relearning": the merged weights relearn a part of the validation half's forget rows, all of them trained (AdamW
  2e-4, 8 rows a step); the greatest ROUGE-L on the test half over 24 steps.
- `solve_unlearning`, without training, with each of its targets, in the gate's expert and in that of the contrast, too.

Every run is appended to `runs.jsonl` and not repeated, so that a benchmark that was stopped goes on where it was;
`--minutes 0` only prints the tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from resumed import Runs
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.attribution.sampling import sample_batches
from uoe_peft.data import collate
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import Questions, questions_of
from uoe_peft.moments import SliceMoments
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.training.optim.projection import RetainProjection, moments_of_edits
from uoe_peft.training.solve import solve_unlearning
from uoe_peft.tuner import UOELayer

LOSSES: dict[str, dict[str, Any]] = {
    "NPO + 4 nll": {"forget_loss": "npo", "beta": 0.05, "retain_loss": "nll", "retain_weight": 4.0},
    "GDiff": {"forget_loss": "grad_ascent", "retain_loss": "nll"},
}
EXPERTS = ("gate", "contrast", "random")
VARIANTS = ("plain", "rho 3", "rho 1", "rho 0.1", "rho 1, scaled", "rho 0.1, scaled", "rho 1, experts", "rho 1, router")
SOLVE_TARGETS = ("gradient", "direction", "zero")
SCALES = (1.0, 0.85, 0.7, 0.55)
MAX_NEW_TOKENS = 48
RELEARN_STEPS, RELEARN_RATE, RELEARN_BATCH, RELEARN_LOOKS = 24, 2e-4, 8, (0, 6, 12, 18, 24)


@dataclass
class ProjectionArguments:
    """How long, how often."""

    output_dir: Path = field(default=Path("outputs/projection"), metadata={"help": "Where the runs go."})
    minutes: float = field(default=40.0, metadata={"help": "No run begins after this; start again to go on."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training and of the random expert."})
    losses: list[str] = field(default_factory=lambda: list(LOSSES), metadata={"help": "Which losses."})
    experts: list[str] = field(default_factory=lambda: list(EXPERTS), metadata={"help": "Which experts."})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Which projections."})
    solved: list[str] = field(
        default_factory=lambda: ["gate", "both"], metadata={"help": "Experts of solve_unlearning: the gate's, or both."}
    )
    rates: list[float] = field(default_factory=lambda: [3e-3, 1e-2], metadata={"help": "Learning rates, constant."})
    steps: int = field(default=120, metadata={"help": "Of every run."})
    look_every: int = field(default=40, metadata={"help": "Steps between two looks."})
    batch_size: int = field(default=8, metadata={"help": "Forget rows a step, and as many retain rows."})
    num_forget: int = field(default=80, metadata={"help": "Forget rows that are asked, both halves."})
    num_retain: int = field(default=96, metadata={"help": "Held-out retain rows that are asked, both halves."})
    num_relearned: int = field(default=40, metadata={"help": "Forget rows that are relearned, of the validation half."})
    margin: float = field(default=0.05, metadata={"help": "Above the twin's forget ROUGE-L."})


@dataclass(frozen=True)
class Ground:
    """What all runs share: rows to train on, questions by half and set, experts by who chose them, the limit."""

    forget: Dataset
    retain: Dataset
    relearned: Dataset
    asked: dict[str, dict[str, Questions]]
    experts: dict[str, list[tuple[int, int]]]
    tokenizer: Any
    limit: float


def main() -> None:
    """Run what has not been run, then print the tables."""
    (args,) = HfArgumentParser(ProjectionArguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    runs = Runs(args.output_dir, minutes=args.minutes)
    ground, references = prepare(args)
    for run in runs.missing({"key": list(key)} for key in planned(args)):
        runs.keep({**run, **unlearn(ground, args, *run["key"])})
    for run in runs.missing(
        {"key": list(key)} for key in product(["solve"], args.solved, SOLVE_TARGETS, [0.0], args.seeds)
    ):
        runs.keep({**run, **solve(ground, *run["key"])})
    print(json.dumps(references), f"forgotten: at most {ground.limit:.3f}")
    print(table(runs, args))
    print(solve_table(runs, args))


Key = tuple[str, str, str, float, int]


def planned(args: ProjectionArguments) -> Iterator[Key]:
    """Loss, expert, variant, learning rate and seed of each run; the best expert first, seeds last."""
    for seed, expert, loss, variant, rate in product(args.seeds, args.experts, args.losses, args.variants, args.rates):
        yield loss, expert, variant, rate, seed


def prepare(args: ProjectionArguments) -> tuple[Ground, dict[str, dict[str, float]]]:
    """The ground, and the ROUGE-L of base and twin on the test half."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
    forget = load_facts([FORGET_TOPIC])
    halves = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC]).train_test_split(test_size=0.5, seed=0)
    forget_halves = forget.train_test_split(test_size=0.5, seed=0)
    retain_halves = halves["test"].train_test_split(test_size=0.5, seed=0)
    asked = {
        half: {
            "forget": questions(forget_halves[split], tokenizer, args.num_forget // 2),
            "retain": questions(retain_halves[split], tokenizer, args.num_retain // 2),
        }
        for half, split in (("validation", "train"), ("test", "test"))
    }
    base, twin = load("base"), load("retrained")
    experts = {
        score: attribute_experts(
            base, forget, processing_class=tokenizer, score=score, retain_dataset=halves["train"], show_progress=False
        ).top(1)
        for score in ("gate", "contrast")
    }
    references = {name: rouge(model, asked["test"], tokenizer) for name, model in (("base", base), ("twin", twin))}
    twins = [rouge(twin, asked[half], tokenizer)["forget"] for half in asked]
    print(experts, references, flush=True)
    relearned = forget_halves["train"].select(range(args.num_relearned))
    ground = Ground(forget, halves["train"], relearned, asked, experts, tokenizer, fmean(twins) + args.margin)
    references["twin"]["relearned"] = max(relearn(twin, ground))
    return ground, references


def questions(rows: Dataset, tokenizer: Any, number: int) -> Questions:
    """The first rows of a half as questions."""
    return questions_of(rows, tokenizer, max_length=None, max_examples=number, seed=0, name="asked")


def load(name: Any) -> Any:
    """A model of the testbed, in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype="float32").eval()


def rouge(model: Any, asked: Mapping[str, Questions], tokenizer: Any) -> dict[str, float]:
    """Mean ROUGE-L recall of greedy answers, by set."""
    model.eval()
    found = {}
    for role, own in asked.items():
        answers = greedy_answers(
            model, own.prompts, tokenizer=tokenizer, max_new_tokens=MAX_NEW_TOKENS, batch_size=64, desc=role
        )
        found[role] = fmean(rouge_l_recall(answers, own.references))
    return found


class Scaled(RetainProjection):
    """P times `sqrt(tr(C_f) / tr(P C_f P))`: forget tokens see steps as large as without a projection."""

    def projection(self, retain: SliceMoments, forget: SliceMoments | None) -> torch.Tensor:
        """P of one slice."""
        matrix = super().projection(retain, forget)
        if forget is None:
            return matrix
        passed = (matrix @ forget.second.double() @ matrix).trace()
        return matrix * (forget.second.double().trace() / passed).sqrt()


class Partly(RetainProjection):
    """Only slices of experts, or only routers, are projected: the others have the identity."""

    part = "experts"

    def _project(self, edited: Any, retain: Any, forget: Any) -> Any:
        projected = super()._project(edited, retain, forget)
        is_router = edited.slices[0].expert_idx is None
        if is_router == (self.part == "experts"):
            projected.matrices = torch.eye(projected.matrices.shape[-1]).expand_as(projected.matrices).clone()
        return projected


class Looks(TrainerCallback):
    """Keeps the deltas of every look."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.deltas: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Copy the deltas if it is time."""
        if state.global_step % self.every == 0:
            self.deltas[state.global_step] = {
                name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
            }


def unlearn(
    ground: Ground, args: ProjectionArguments, loss: str, expert: str, variant: str, rate: float, seed: int
) -> dict[str, Any]:
    """One run: what each look and scale gives on the validation half, and the best of them on the test half."""
    set_seed(seed)
    base = load("base")
    targets = target(ground, base, expert, seed)
    model = get_peft_model(base, UOEConfig(target_experts=targets))
    looks = Looks(args.look_every)
    rho = float(variant.split()[1].strip(",")) if variant.startswith("rho") else None
    own_callback = projection(variant, rho, model, ground)
    trainer = UnlearningTrainer(
        model=model,
        args=UnlearningConfig(
            output_dir=str(args.output_dir / "training"),
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            retain_projection=None if own_callback else rho,
            log_routing=False,
            logging_steps=args.steps,
            save_strategy="no",
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_cpu=True,
            **LOSSES[loss],
        ),
        train_dataset=ground.forget,
        retain_dataset=ground.retain,
        processing_class=ground.tokenizer,
        callbacks=[*own_callback, looks],
    )
    started = time.process_time()
    try:
        trainer.train()
    except FloatingPointError as error:
        print(error)
    seconds = round(time.process_time() - started, 1)
    curve = [
        [step, scale, *scores(model, deltas, scale, ground, "validation").values()]
        for step, deltas in (looks.deltas or {0: {}}).items()
        for scale in SCALES
    ]
    step, scale, forget, retain = best(curve, ground.limit)
    test = scores(model, looks.deltas.get(step, {}), scale, ground, "test")
    relearned = relearn(model.merge_and_unload(), ground)
    chosen = {"step": step, "scale": scale, "forget": forget, "retain": retain, "forgotten": forget <= ground.limit}
    return {
        "experts": targets,
        "curve": [[round(value, 4) for value in point] for point in curve],
        "chosen": chosen,
        "test": test,
        "relearned": max(relearned),
        "relearning": relearned,
        "seconds": seconds,
    }


def solve(ground: Ground, _: str, experts: str, target: str, rate: float, seed: int) -> dict[str, Any]:
    """`solve_unlearning`, which chooses its strength by itself; seconds are of all that it does."""
    pairs = sorted({pair for score, own in ground.experts.items() for pair in own if experts in ("both", score)})
    started = time.process_time()
    model = solve_unlearning(
        load("base"),
        ground.forget,
        ground.retain,
        processing_class=ground.tokenizer,
        target_experts=pairs,
        target=target,
        seed=seed,
        show_progress=False,
    )
    seconds = round(time.process_time() - started, 1)
    test = rouge(model, ground.asked["test"], ground.tokenizer)
    relearning = relearn(model.merge_and_unload(), ground)
    return {
        "experts": pairs,
        "test": test,
        "relearned": max(relearning),
        "relearning": relearning,
        "seconds": seconds,
    }


def solve_table(runs: Sequence[Mapping[str, Any]], args: ProjectionArguments) -> str:
    """One row a target and choice of experts: test forget and retain, after relearning, seconds; mean over seeds."""
    lines = ["| experts | target | forget | retain | after relearning | CPU seconds |", "|---|---|---|---|---|---|"]
    for experts, target in product(args.solved, SOLVE_TARGETS):
        own = [run for run in runs if tuple(run["key"][:3]) == ("solve", experts, target)]
        if own:
            forget, retain = (fmean(run["test"][role] for run in own) for role in ("forget", "retain"))
            cells = [f"{forget:.3f}", f"{retain:.3f}", f"{fmean(run['relearned'] for run in own):.2f}"]
            lines.append(f"| {experts} | {target} | {' | '.join(cells)} | {fmean(run['seconds'] for run in own):.1f} |")
    return "\n".join(lines)


def projection(variant: str, rho: float | None, model: Any, ground: Ground) -> list[RetainProjection]:
    """The callback of a variant that the package does not offer; none for the others."""
    kind = variant.partition(", ")[2]
    if not kind or rho is None:
        return []

    def measure(role: str) -> Any:
        rows = ground.forget if role == "forget" else ground.retain
        batches = sample_batches(
            rows, ground.tokenizer, max_tokens=100_000, batch_size=16, max_length=None, seed=0, name=role
        )
        return moments_of_edits(model, batches, name=role)

    if kind == "scaled":
        return [Scaled(model, measure, rho=rho)]
    partly = Partly(model, measure, rho=rho)
    partly.part = kind
    return [partly]


def target(ground: Ground, base: Any, expert: str, seed: int) -> list[tuple[int, int]]:
    """The expert of a run."""
    if expert != "random":
        return ground.experts[expert]
    config = base.config
    place = int(torch.randint(config.num_hidden_layers * config.num_experts, (1,), generator=seeded(seed)))
    return [divmod(place, config.num_experts)]


def seeded(seed: int) -> torch.Generator:
    """A generator for one draw."""
    return torch.Generator().manual_seed(seed)


def scores(model: Any, deltas: Mapping[str, torch.Tensor], scale: float, ground: Ground, half: str) -> dict[str, float]:
    """ROUGE-L of the deltas at a scale; the model keeps both."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            parameters[name].copy_(delta)
    for layer in model.modules():
        if isinstance(layer, UOELayer):
            layer.set_scale("default", scale)
    return rouge(model, ground.asked[half], ground.tokenizer)


def best(curve: Sequence[Sequence[float]], limit: float) -> tuple[int, float, float, float]:
    """Step, scale, forget and retain of the best retain under the forget limit; else of the least forget."""
    under = [point for point in curve if point[2] <= limit]
    step, scale, forget, retain = (
        max(under, key=lambda point: point[3]) if under else min(curve, key=lambda point: point[2])
    )
    return int(step), scale, forget, retain


def relearn(model: Any, ground: Ground) -> list[float]:
    """ROUGE-L on the test half's forget rows while all weights relearn other forget rows."""
    weights, model = model.state_dict(), load("base")  # a copy would call what a trainer put on the original
    model.load_state_dict(weights)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=RELEARN_RATE, weight_decay=0.0)
    own = questions_of(ground.relearned, ground.tokenizer, max_length=None, max_examples=None, seed=0, name="relearned")
    order = torch.randperm(len(own.examples), generator=seeded(0)).repeat(1 + RELEARN_STEPS)
    found = []
    for step in range(RELEARN_STEPS + 1):
        if step in RELEARN_LOOKS:
            found.append(rouge(model, {"forget": ground.asked["test"]["forget"]}, ground.tokenizer)["forget"])
        rows = [own.examples[i] for i in order[step * RELEARN_BATCH : (step + 1) * RELEARN_BATCH].tolist()]
        batch = collate(rows, pad_token_id=ground.tokenizer.pad_token_id)
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return [round(value, 4) for value in found]


def rank(chosen: Mapping[str, Any]) -> tuple[bool, float]:
    """What makes a run the one to choose: to have forgotten, then the retain score; else the forget score."""
    return chosen["forgotten"], chosen["retain"] if chosen["forgotten"] else -chosen["forget"]


def table(runs: Sequence[Mapping[str, Any]], args: ProjectionArguments) -> str:
    """One row a variant, one column an expert and loss: test forget / retain (after relearning), mean over seeds."""
    lines = ["| expert | loss | variant | rate | step x scale | forget | retain | after relearning | seeds |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for expert, loss, variant in product(args.experts, args.losses, args.variants):
        own = [run for run in runs if tuple(run["key"][:3]) == (loss, expert, variant)]
        chosen = [
            max(of_seed, key=lambda run: rank(run["chosen"]))
            for seed in args.seeds
            if (of_seed := [run for run in own if run["key"][4] == seed])
        ]
        if not chosen:
            continue
        forget, retain = (fmean(run["test"][role] for run in chosen) for role in ("forget", "retain"))
        rates = "/".join(f"{run['key'][3]:g}" for run in chosen)
        places = ", ".join(f"{run['chosen']['step']} x {run['chosen']['scale']}" for run in chosen)
        reached = "" if all(run["chosen"]["forgotten"] for run in chosen) else "*"
        relearned = fmean(run["relearned"] for run in chosen)
        cells = [expert, loss, variant, rates, places, f"{forget:.3f}{reached}", f"{retain:.3f}", f"{relearned:.2f}"]
        lines.append("| " + " | ".join([*cells, str(len(chosen))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
