"""What makes forgetting deep, and proof against silencing the edited experts: many cheap trials on several grounds.

    python benchmarks/trials.py [--trials "NPO, 1"] [--seeds 0 1 2] [--output_dir outputs/trials] [--minutes 30]
    python benchmarks/trials.py --ground outputs/tofu_tau0.6 --output_dir outputs/trials_tofu

The first is the testbed, the second what `grounds.py` has written. A trial is one training of 200 steps of 8 + 8 rows,
the rate falling linearly, at strength 1: a loss, what is trained by it, and at most one aid (see `Aid`). Rows are
split as `depth.py` splits them: all forget rows are trained on, every fourth can be relearned (40 of them at most), the
others are asked; of the retain rows half are trained on and others asked. A third of the asked rows are for validation,
the rest is reported. Aids that work on gradients are in `trials_surgery.py`, those of retain rows in `trials_data.py`
(WikiText is found by the variable UOE_DATA).

Scores are ROUGE-L recall of greedy answers. "Relearned": greatest forget score after 6, 12, 18 and 24 steps of all
weights on the rows for that; `--relearn_rate` and `--relearn_steps` attack harder. "One silent": greatest forget score
with one of the edited experts silent, whichever it is; "all silent": with all of them (of models without an edited
expert: with that of one expert's trials). "Old weights": the edited experts as they were, beside the trained routers.

Of several rates the one counts whose run with seed 0 relearns least on the validation rows, among those that keep 0.90
of the base's retain score there; where none does, the one that keeps most. Further seeds take that rate alone. Runs are
appended to `runs.jsonl` and not repeated; `--minutes 0` prints the table.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import torch
from datasets import Dataset, disable_progress_bars
from depth import DEMO, LOSSES, NPO, RMU
from peft import LoraConfig, PeftModel
from resumed import Run, Runs
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging
from trials_data import kept_rows
from trials_surgery import SurgicalTrainer
from trials_training import Aid, Pairs, RetainData, Surgery

from uoe_peft import ExpertAttribution, UnlearningConfig, UOEConfig, attribute_experts
from uoe_peft.cli.loading import load_rows
from uoe_peft.evaluation.attacks import expert_restored, relearning, silenced_expert
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import questions_of
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.tuner import UOELayer

REFERENCES = ("base", "retrained")
HALVES = ("validation", "test")
COLUMNS = ("forget", "retain", "relearned", "one silent", "all silent", "old weights")
KEPT = 0.90  # share of the base's retain score
KEEPING = (0.3, 1, 3, 10, 30)
SHARES = (10, 30, 100, 300, 1000)  # weights of hidden states kept as shares of their norms
HIDDEN = {**NPO, "retain_loss": "embed_diff", "rmu_layer": -1}  # after the last layer
ALL_LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    **LOSSES,
    "NPO, twice the retain weight": ({**NPO, "retain_weight": 16.0}, 1.0),
    "RMU, beta 20": ({**RMU, "beta": 20.0}, 1.0),
    **{f"NPO, hidden states kept {weight}": ({**HIDDEN, "retain_weight": weight}, 1.0) for weight in KEEPING},
    **{
        f"NPO, shares of hidden states kept {weight}": (
            {**HIDDEN, "retain_loss": "relative_embed_diff", "retain_weight": weight},
            1.0,
        )
        for weight in SHARES
    },
    "refusals": ({"forget_loss": "idk", "retain_weight": NPO["retain_weight"]}, 1.0),
}
Scores = dict[str, float]
BY_GRADIENT = (
    "8 by gradient"  # of all layers, for how much their weights move the forget loss per unit of the retain loss
)
# What is trained. Experts are the best of each layer by `contrast`.
PARTS: dict[str, Callable[[ExpertAttribution], Pairs]] = {
    "1": lambda found: found.top(1),
    "1 of layer 0": lambda found: found.top(1, strategy="each_layer", exclude_layers=(1, 2, 3)),
    "2 of layer 0": lambda found: found.top(2, strategy="each_layer", exclude_layers=(1, 2, 3)),
    "4 of layer 0": lambda found: found.top(4, strategy="each_layer", exclude_layers=(1, 2, 3)),
    "2, upper": lambda found: found.top(1, strategy="each_layer", exclude_layers=(0, 1)),
    "4, upper": lambda found: found.top(2, strategy="each_layer", exclude_layers=(0, 1)),
    "8, upper": lambda found: found.top(4, strategy="each_layer", exclude_layers=(0, 1)),
    "8": lambda found: found.top(2, strategy="each_layer"),
    BY_GRADIENT: lambda found: found.top(8),
    "LoRA": lambda found: [],
    "all": lambda found: [],
}


@dataclass(frozen=True)
class Trial:
    """A row of the table.

    Attributes:
        part: Of `PARTS`.
        rates: Learning rates to choose from.
        losses: Of `depth.LOSSES`, one after the other in equal shares of the steps.
        aid: What is tried beside.
        own: Further settings of the trainer.
    """

    part: str
    rates: tuple[float, ...]
    losses: tuple[str, ...] = (DEMO,)
    aid: Aid = field(default_factory=Aid)
    own: dict[str, Any] = field(default_factory=dict)


RATES = {"1": 5e-3, "8, upper": 2e-3, "LoRA": 3e-3, "all": 5e-4}  # of others 3e-3; chosen by `depth.py` on seed 0
CAREFUL = ("NPO, twice the retain weight",)
STEERED = ("RMU, beta 10",)


# Settings of the trainer: as the attack that is scored, and as sharpness-aware steps, radius 1e-3 of each weight.
RELEARNED = {"relearner_steps": 24}
RELEARNED_HARD = {"relearner_steps": 48, "relearner_rate": 6e-4}  # three times the rate, twice the steps
SHARP = {"relearner_steps": 2, "relearner_rate": 1e-3}


def trial(part: str, losses: tuple[str, ...] = (DEMO,), own: Any = None, *, factor: float = 1.0, **aid: Any) -> Trial:
    """A trial at the rate that is usual for what it trains, or at a multiple of it."""
    return Trial(part, (RATES.get(part, 3e-3) * factor,), losses, Aid(**aid), own or {})


# What gradients, masks and retain rows can do, tried with eight experts: aids and settings of the trainer.
AIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{kind: ({"surgery": kind}, {}) for kind in get_args(Surgery)},
    **{f"RepSelect, one step, {role}": ({"one_step": role}, {}) for role in ("forget", "retain")},
    **{f"rho {rho:g}": ({}, {"retain_projection": rho}) for rho in (0.1, 1.0, 10.0)},
    **{f"K-FAC, rho {rho:g}": ({"damped_outputs": rho}, {}) for rho in (0.1, 1.0, 10.0)},
    **{f"WAGLE {ratio:g}": ({}, {"weight_mask_ratio": ratio}) for ratio in (0.2, 0.5, 0.8)},
    **{kind: ({"retain_data": kind}, {}) for kind in get_args(RetainData)},
}
AIDED = {"NPO": DEMO, **{f"NPO, hidden {weight}": f"NPO, hidden states kept {weight}" for weight in KEEPING}}

TRIALS: dict[str, Trial] = {
    # Where, and how many.
    **{f"NPO: {part}": trial(part) for part in PARTS},
    **{f"RMU 10: {part}": trial(part, STEERED) for part in PARTS},
    **{f"RMU 20: {part}": trial(part, ("RMU, beta 20",)) for part in ("1", "1 of layer 0", "8")},
    **{f"RMU 10, then refusals: {part}": trial(part, (*STEERED, "refusals")) for part in ("1", "1 of layer 0", "8")},
    # What is kept.
    **{
        f"NPO, hidden {weight}: {part}": trial(part, (f"NPO, hidden states kept {weight}",))
        for part in PARTS
        for weight in KEEPING
    },
    **{
        f"NPO, share {weight}: {part}{end}": trial(part, (f"NPO, shares of hidden states kept {weight}",), own)
        for part in PARTS
        for weight in SHARES
        for end, own in (("", None), (", relearner", RELEARNED), (", hard relearner", RELEARNED_HARD))
    },
    # The expert as it begins.
    **{f"NPO: {part}, from others": trial(part, start="others") for part in ("1", "1 of layer 0", "8")},
    **{f"NPO: {part}, from noise": trial(part, start="noise") for part in ("1", "1 of layer 0", "8")},
    # A second forget pass.
    **{f"NPO: {part}, knocked out": trial(part, knocked_out=True) for part in PARTS if part not in ("LoRA", "all")},
    **{f"NPO: {part}, relearner": trial(part, own=RELEARNED) for part in PARTS},
    **{f"RMU 10: {part}, relearner": trial(part, STEERED, RELEARNED) for part in PARTS},
    **{
        f"NPO, hidden {weight}: {part}, relearner": trial(part, (f"NPO, hidden states kept {weight}",), RELEARNED)
        for part in PARTS
        for weight in KEEPING
    },
    **{f"NPO: {part}, sharpness": trial(part, own=SHARP) for part in PARTS},
    **{f"NPO 16: {part}, relearner": trial(part, CAREFUL, RELEARNED) for part in PARTS},
    # The course of training.
    **{f"NPO: {part}, healed": trial(part, factor=2.0, forget_share=0.5) for part in PARTS},
    **{f"NPO: {part}, averaged": trial(part, factor=2.0, average_from=0.5) for part in PARTS},
    # Gradients, masks and retain rows.
    **{
        f"{loss}: 8, {name}{end}": trial("8", (AIDED[loss],), {**settings, **own}, **aid)
        for loss, (name, (aid, settings)), (end, own) in product(
            AIDED, AIDS.items(), (("", {}), (", relearner", RELEARNED))
        )
    },
}


@dataclass
class TrialsArguments:
    """What to run, where, for how long."""

    output_dir: Path = field(default=Path("outputs/trials"), metadata={"help": "Where runs go."})
    ground: Path | None = field(default=None, metadata={"help": "Folder that grounds.py wrote; None: the testbed."})
    trials: list[str] = field(default_factory=lambda: list(TRIALS), metadata={"help": "Names in `TRIALS`."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    steps: int = field(default=200, metadata={"help": "Of every training."})
    rate_factor: float = field(default=1.0, metadata={"help": "On all learning rates, for other models."})
    full_rate_factor: float = field(default=1.0, metadata={"help": "On those of all parameters, beside the other."})
    relearn_rate: float = field(default=2e-4, metadata={"help": "Of the attack that is scored."})
    relearn_steps: int = field(default=24, metadata={"help": "Of the attack; scored after each quarter of them."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this."})


def main() -> None:
    """Run what is not there yet, and print the table."""
    (args,) = HfArgumentParser(TrialsArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    unknown = sorted(set(args.trials) - set(TRIALS))
    if unknown:
        raise ValueError(f"unknown trials {unknown}; use some of {list(TRIALS)}")
    runs = Runs(args.output_dir, minutes=args.minutes)
    ground = None
    for key in runs.missing(planned(args, runs)):
        ground = ground or Ground(args.ground, relearn_rate=args.relearn_rate, relearn_steps=args.relearn_steps)
        name, rate, seed = key.values()
        scores = ground.reference(name) if name in REFERENCES else ground.unlearn(TRIALS[name], rate, seed, args.steps)
        runs.keep({**key, **scores})
    print(table(runs))


def planned(args: TrialsArguments, runs: list[Run]) -> Iterator[Run]:
    """Trial, rate and seed of each run; `runs` grows meanwhile, and the first seed's choose the others' rates."""
    yield from ({"trial": name, "rate": 0.0, "seed": 0} for name in REFERENCES)
    for seed in args.seeds:
        for name in args.trials:
            factor = args.rate_factor * (args.full_rate_factor if TRIALS[name].part == "all" else 1.0)
            rates = [rate * factor for rate in TRIALS[name].rates] if seed == 0 else [chosen_rate(name, runs)]
            yield from ({"trial": name, "rate": rate, "seed": seed} for rate in rates)


def chosen_rate(name: str, runs: list[Run]) -> float:
    """The rate whose run with seed 0 is deepest on validation rows, of those that keep enough there."""
    own = [run for run in runs if run["trial"] == name and run["seed"] == 0]
    if not own:
        raise ValueError(f"run seed 0 of {name!r} first: it chooses the rate")
    enough = KEPT * next(run["retain"][0] for run in runs if run["trial"] == "base")
    keeping = [run for run in own if run["retain"][0] >= enough]
    best = min(keeping, key=lambda run: run["relearned"][0]) if keeping else max(own, key=lambda run: run["retain"][0])
    return float(best["rate"])


class Ground:
    """A base model, its twin, and rows: what is trained on, relearned and asked."""

    def __init__(self, folder: Path | None, *, relearn_rate: float = 2e-4, relearn_steps: int = 24) -> None:
        self.attack = {"learning_rate": relearn_rate, "steps": [relearn_steps * part // 4 for part in (1, 2, 3, 4)]}
        self.models: dict[str, Any] = {name: folder / name if folder else checkpoint_path(name) for name in REFERENCES}
        self.tokenizer = AutoTokenizer.from_pretrained(self.models["base"])
        if folder:
            self.forget, others = (load_rows(str(folder / f"{role}.jsonl")) for role in ("forget", "retain"))
        else:
            self.forget, others = load_facts([FORGET_TOPIC]), load_facts([t for t in TOPICS if t != FORGET_TOPIC])
        halves = others.train_test_split(test_size=0.5, seed=0)
        self.retain = halves["train"]
        learned = list(range(0, len(self.forget), 4))
        self.learned_again = self.forget.select(learned[:40])
        asked = {
            "forget": self.forget.select([i for i in range(len(self.forget)) if i % 4]),
            "retain": halves["test"].select(range(min(300, len(halves["test"])))),
        }
        self.asked = {role: self._questions(rows, role) for role, rows in asked.items()}
        self.found = self.attributed(self.forget, score="contrast", retain_dataset=self.retain)

    def attributed(self, rows: Dataset, **asked: Any) -> ExpertAttribution:
        """Affinities of the base's experts to a set."""
        model, tokenizer = self.load("base"), self.tokenizer
        return attribute_experts(model, rows, processing_class=tokenizer, batch_size=50, show_progress=False, **asked)

    def by_gradient(self) -> ExpertAttribution:
        """`sum |w g|` over an expert's weights, g the gradient on forget rows, divided by the same on retain rows."""
        forget, retain = (self.attributed(rows, score="gradient") for rows in (self.forget, self.retain))
        return replace(forget, affinity=forget.affinity / retain.affinity)

    def _questions(self, rows: Dataset, name: str) -> Any:
        return questions_of(rows, self.tokenizer, max_length=None, max_examples=None, seed=0, name=name)

    def load(self, name: Any) -> Any:
        """A model, fresh from disk, in float32."""
        return AutoModelForCausalLM.from_pretrained(self.models.get(name, name), dtype=torch.float32).eval()

    def reference(self, name: str) -> dict[str, Any]:
        """The scores of a model that was not unlearned."""
        return self.scores(self.load(name), self.found.top(1))

    def unlearn(self, trial: Trial, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Train, and score what was written to disk: a copy of a trained model would go on calling the original."""
        set_seed(seed)
        if ("layer 0" in trial.part or "upper" in trial.part) and list(self.found.layer_indices) != [0, 1, 2, 3]:
            raise ValueError(f"{trial.part!r} is for four layers of experts, not for {self.found.layer_indices}")
        experts = PARTS[trial.part](self.by_gradient() if trial.part == BY_GRADIENT else self.found)
        retain = kept_rows(
            trial.aid.retain_data, self.retain, self.forget, model=self.load("base"), tokenizer=self.tokenizer
        )
        model, config, started = self.load("base"), adapter(trial.part, experts), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            for loss in trial.losses:
                own, factor = ALL_LOSSES[loss]
                trainer = SurgicalTrainer(
                    aid=trial.aid,
                    experts=experts,
                    model=model,
                    args=training_arguments(
                        folder,
                        learning_rate=rate * factor,
                        max_steps=steps // len(trial.losses),
                        seed=seed,
                        **own,
                        **trial.own,
                    ),
                    train_dataset=self.forget,
                    retain_dataset=retain,
                    processing_class=self.tokenizer,
                    peft_config=config,
                )
                trainer.train()
                model, config = trainer.model, None
            seconds = round(time.process_time() - started, 1)
            trainer.save_model(folder)
            model = self.load(folder) if trial.part == "all" else PeftModel.from_pretrained(self.load("base"), folder)
            return {"seconds": seconds, **self.scores(model.eval(), experts or self.found.top(1))}

    def scores(self, model: Any, experts: Pairs) -> dict[str, list[float]]:
        """By name a score of the validation rows and one of the others."""
        before = self.ask(model, "forget")

        def forget(attacked: Any, **_: Any) -> Scores:
            return self.ask(attacked, "forget")

        again = relearning(
            model,
            self.learned_again,
            processing_class=self.tokenizer,
            score=forget,
            before=before,
            **self.attack,
        ).after
        silent = [silenced_expert(model, score=forget, experts=[pair], before=before).after for pair in experts]
        all_silent = silenced_expert(model, score=forget, experts=experts, before=before).after
        edited = any(isinstance(layer, UOELayer) for layer in model.modules())
        found = {
            "forget": before,
            "retain": self.ask(model, "retain"),
            "relearned": again,
            "one silent": {half: max(scores[half] for scores in silent) for half in before},
            "all silent": all_silent,
            "old weights": expert_restored(model, score=forget, before=before).after if edited else before,
        }
        # Attacks have "forget_validation" and beside it what they did, such as "step".
        return {
            name: [round(halves["retain_" + half if name == "retain" else "forget_" + half], 4) for half in HALVES]
            for name, halves in found.items()
        }

    def ask(self, model: Any, role: str) -> Scores:
        """Mean ROUGE-L of the validation rows, a third of all, and of the others."""
        asked = self.asked[role]
        answers = greedy_answers(
            model, asked.prompts, tokenizer=self.tokenizer, max_new_tokens=48, batch_size=150, desc=role
        )
        rouge = rouge_l_recall(answers, asked.references)
        others = [value for place, value in enumerate(rouge) if place % 3]
        # Attacks report the greatest of each score that begins with "forget".
        return {f"{role}_{half}": fmean(values) for half, values in zip(HALVES, (rouge[::3], others), strict=True)}


def adapter(part: str, experts: Pairs) -> Any:
    """What is trained."""
    match part:
        case "all":
            return None
        case "LoRA":
            return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        case _:
            return UOEConfig(target_experts=experts)


def training_arguments(folder: str, **own: Any) -> UnlearningConfig:
    """Those of the demo but for the loss, and that no strength is chosen."""
    return UnlearningConfig(
        folder,
        calibrate=False,
        per_device_train_batch_size=8,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=own["max_steps"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **own,
    )


def table(runs: list[Run]) -> str:
    """Means over seeds at the chosen rate, as Markdown."""
    lines = ["| trial | rate | " + " | ".join(COLUMNS) + " | CPU s | seeds |", "|---" * (len(COLUMNS) + 4) + "|"]
    for name in dict.fromkeys(run["trial"] for run in runs):
        rate = 0.0 if name in REFERENCES else chosen_rate(name, runs)
        own = [run for run in runs if run["trial"] == name and run["rate"] == rate]
        cells = [spread([run[column][1] for run in own]) for column in COLUMNS]
        seconds = f"{fmean(run['seconds'] for run in own):.0f}" if rate else ""
        lines.append(f"| {name} | {rate:g} | {' | '.join(cells)} | {seconds} | {len(own)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and the deviation over seeds where there are several."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
