"""The comparison of Table 3 of https://arxiv.org/abs/2411.18797: every loss with every choice of what is trained.

    python benchmarks/table3.py [--output_dir outputs/table3] [--minutes 60] [--seeds 0 1 2]

Trained: all parameters; LoRA on attention and dense layers; the experts of each layer that together hold a share p of
the affinity, as in ESFT (https://arxiv.org/abs/2407.01906); a random expert with its router; the expert that the gate
or the contrast chooses, with its router; and the contrast's best experts of each layer, with their routers.

One budget of steps and rows and one weight of each loss for all parts, and equally many learning rates for all parts of
a loss. Forget rows, and retain rows that training has not seen, are asked in two halves. The *validation* half chooses
rate, step and strength: the model is `base + strength * (trained - base)`, which is an adapter's scale, and for full
training the interpolation with the base. What counts is the best retain ROUGE-L where forget ROUGE-L *and* answer
probability are at or below the retrained twin's + `margin`. The *test* half is reported, and beside it what is left of
the chosen model's forgetting after all its weights relearned other forget rows (24 steps, the maximum along the way),
and after rounding to int4. What is shrunk to a limit is shallow; so a second table has the same runs' ends, at the last
step and full strength, at the rate that keeps most of those whose end is under the limits. The runs of the first seed
choose a cell's rates; further seeds are run at those alone, with the prefix cache where the trainer finds that it can
be used.

Without options this is the shipped testbed, which takes about 40 seconds a run on one CPU core. Any model and sets will
do: `--model_name_or_path X --retrained_model T --forget_dataset F --retain_dataset R`; `--rate_factor 0.1` multiplies
all rates, `--full_rate_factor` those of all parameters once more. `--attacks false`, which may be said of further seeds
alone, leaves relearning and rounding out. Every run is appended to `runs.jsonl` and not repeated, so that a benchmark
that was stopped goes on where it was; `--minutes 0` only writes tables and picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from datasets import disable_progress_bars
from peft import LoraConfig, PeftConfig, get_peft_model
from table3_ground import Ground, base_weights, load, prepare, rounded, scores, tested
from table3_report import CHOICES, Choice, Look, Run, Table, cells_of, choose, write_report
from table3_settings import EXPERTS_A_LAYER, LOSSES, RATES, Table3Arguments, check_settings
from transformers import HfArgumentParser, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import ExpertAttribution, UnlearningConfig, UnlearningTrainer, UOEConfig
from uoe_peft.training.choices import HIDDEN_RETAIN_LOSSES


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
        rivals = [run for run in runs if (run.loss, run.part, run.seed) == (loss, part, seed) and seed == args.seeds[0]]
        runs.append(unlearn(ground, *key, rivals=rivals))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(runs[-1])) + "\n")
        print(runs[-1].summary(), flush=True)
    cells = cells_of(runs, first_seed=args.seeds[0])
    write_report(args.output_dir, runs, Table(cells, references, ground.limits, args.losses, args.parts))


def planned(args: Table3Arguments, runs: Sequence[Run]) -> Iterator[tuple[str, str, float, int]]:
    """Loss, part, learning rate and seed of each run; a first value of everything before a second of anything.

    Further seeds are run only at the rates that the first one chose; by then `runs` holds all runs of the first.
    """
    first, *further = args.seeds
    factors = {part: args.rate_factor * (args.full_rate_factor if part == "all" else 1.0) for part in args.parts}
    for place, loss, part in product(range(args.num_rates), args.losses, args.parts):
        rates = RATES[loss][{"all": 0, "LoRA": 1}.get(part, 2)]
        if place < len(rates):
            yield loss, part, rates[place] * factors[part], first
    cells = cells_of(runs, first_seed=first)
    for seed, loss, part in product(further, args.losses, args.parts):
        for rate in sorted({cells[name, loss, part].rate for name in CHOICES}):
            yield loss, part, rate, seed


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


def unlearn(ground: Ground, loss: str, part: str, rate: float, seed: int, *, rivals: Sequence[Run]) -> Run:
    """One run, from the base model: its looks, and its choices among them, tested where they beat those of `rivals`."""
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
    run = Run(
        loss=loss,
        part=part,
        rate=rate,
        seed=seed,
        looks=looks,
        choices={},
        seconds=round(seconds, 1),
        cached=arguments.prefix_cache is not False,
        trainable=sum(p.numel() for p in trained),
        total=sum(p.numel() for p in load(ground.base, ground.args.dtype).parameters()),
        bytes=sum(p.numel() * p.element_size() for p in trained),
        experts=[list(pair) for pair in targets],
    )
    for name in CHOICES:
        choice = choose(name, looks, ground.limits)
        if all(choice.merit > rival.choices[name].merit for rival in rivals):
            choice = replace(choice, test=test_scores(ground, weights, choice.look, run.choices))
        run.choices[name] = choice
    return run


def test_scores(
    ground: Ground, weights: Mapping[int, Mapping[str, torch.Tensor]], chosen: Look, known: Mapping[str, Choice]
) -> dict[str, float]:
    """The scores of a look's model on the test half, computed once where two choices meet."""
    for choice in known.values():
        if choice.test and choice.look == chosen:
            return choice.test
    return rounded(tested(ground, strengthened(ground, weights.get(chosen.step, {}), chosen.strength)))


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
    looks = [base_look(ground)]
    for step, own in weights.items():
        for strength in ground.args.strengths:
            looks.append(look_at(ground, own, step, strength))
            if not ground.limits.met(looks[-1]):
                break
    return looks


@cache
def base_look(ground: Ground) -> Look:
    """What the base model gives."""
    return look_at(ground, {}, 0, 0.0)


def look_at(ground: Ground, weights: Mapping[str, torch.Tensor], step: int, strength: float) -> Look:
    """One look at the validation half."""
    found = rounded(scores(ground, strengthened(ground, weights, strength), "validation"))
    return Look(step, strength, found["forget"], found["retain"], found["probability"])


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
    elif own["forget_loss"] != "rmu" and own["retain_loss"] in HIDDEN_RETAIN_LOSSES:
        own["rmu_layer"] = -1
    return UnlearningConfig(
        output_dir=str(args.output_dir / "training"),
        learning_rate=rate,
        lr_scheduler_type="linear",
        max_steps=args.steps,
        calibrate=False,  # the looks choose the strength
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
