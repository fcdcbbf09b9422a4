"""The testbed's card: base, retrained twin, UOE, LoRA and full fine-tuning, by every metric and under every attack.

    python benchmarks/card.py [--output_dir outputs/card] [--seeds 0 1 2] [--minutes 60]
    python benchmarks/card.py --base DIR/base --retrained DIR/retrained --data TOFU --output_dir outputs/card_tofu

Every model is trained on the same rows with the same losses (the demo's: NPO with refusals and 8 times the retain loss,
200 steps of 8 + 8 rows, the rate falling linearly), at a rate of its own, chosen by hand on seed 0 (`depth.py`). Two of
the ten facts of each forgotten subject are not unlearned: relearning learns them, or other rows of the forget set, or
rows that have nothing to do with it. All models are attacked with equal budgets: 24 forget and 24 retain rows are
asked, the attack with the highest forget score along the way counts; GCG is left out. The twin, which never saw the
forget set, says what can be had by guessing. "One expert, weaker" has the greatest strength at which 0.99 of the retain
rows' probability is left, as the trainer chooses it on rows of its own.

A run is a model and an attack, or a model and all metrics. It is appended to `runs.jsonl` and not repeated, so that
what was stopped goes on; the tables are then in `card.md`, and printed. `--minutes 0` only writes them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from card_ground import Ground, load, testbed_ground, tofu_ground
from datasets import disable_progress_bars
from peft import LoraConfig, PeftModel
from resumed import Runs
from transformers import HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts, evaluate_unlearning
from uoe_peft.errors import NotApplicableError
from uoe_peft.evaluation import SuiteScore
from uoe_peft.evaluation.attacks import AttackName, run_attack
from uoe_peft.evaluation.suites.suite import OTHER_PROMPT

RATES = {"one expert": 5e-3, "2 of each layer": 3e-3, "LoRA": 3e-3, "all parameters": 5e-4}
WEAKER = "one expert, weaker"
MODELS = ("base", "retrained", "one expert", WEAKER, "2 of each layer", "LoRA", "all parameters")
RELEARNING = ("forget rows", "same subjects", "benign rows")
ATTACKS = (
    *(f"relearning, {rows}" for rows in RELEARNING),
    "silenced_expert",
    "expert_restored",
    "int4",
    *(n for n in get_args(AttackName) if n not in ("relearning", "gcg", "silenced_expert", "expert_restored", "int4")),
)
METRICS = "metrics"


@dataclass
class CardArguments:
    """What to run, on what, for how long."""

    output_dir: Path = field(default=Path("outputs/card"), metadata={"help": "Where models, runs and tables go."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this; start again to go on."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "Columns."})
    attacks: list[str] = field(default_factory=lambda: [METRICS, *ATTACKS], metadata={"help": "Rows."})
    num_asked: int = field(default=24, metadata={"help": "Rows of each set that attacks are scored on."})
    num_measured: int = field(default=80, metadata={"help": "Rows of each set that metrics are over."})
    base: Path | None = field(default=None, metadata={"help": "Of another ground, with --retrained and --data."})
    retrained: Path | None = field(default=None, metadata={"help": "Its twin."})
    data: Path | None = field(default=None, metadata={"help": "Folder with TOFU's files."})


def main() -> None:
    """Run what has not been run, then write the tables."""
    (args,) = HfArgumentParser(CardArguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)
    runs, card = Runs(args.output_dir, minutes=args.minutes), None
    for key in runs.missing(dict(zip(("model", "seed", "attack"), own, strict=True)) for own in wanted(args)):
        card = card or Card(args)
        runs.keep({**key, **card.run(*key.values())})
    (args.output_dir / "card.md").write_text(tables(runs), encoding="utf-8")
    print(tables(runs))


def wanted(args: CardArguments) -> Iterator[tuple[str, int, str]]:
    """Model, seed and attack: every model of the first seed before a second one; the twins are no training's."""
    for seed in args.seeds:
        for attack in args.attacks:
            for model in args.models:
                if seed == args.seeds[0] or model not in ("base", "retrained"):
                    yield model, seed, attack


class Card:
    """Trains what is missing, and asks and attacks it."""

    def __init__(self, args: CardArguments) -> None:
        self.args = args
        other = [args.base, args.retrained, args.data]
        if any(other) and not all(other):
            raise ValueError("another ground needs all of --base, --retrained and --data")
        self.ground: Ground = tofu_ground(*other) if all(other) else testbed_ground()  # type: ignore[arg-type]
        self.score = SuiteScore(
            self.ground.asked, self.ground.tokenizer, max_examples=args.num_asked, batch_size=24, max_new_tokens=40
        )
        self._loaded: dict[tuple[str, int], Any] = {}
        self._before: dict[tuple[str, int], Any] = {}

    def run(self, name: str, seed: int, attack: str) -> dict[str, Any]:
        """One run's line."""
        model = self.model(name, seed)
        started = time.process_time()
        found = self.metrics(name, model) if attack == METRICS else self.attacked((name, seed), model, attack)
        return found | {"seconds": round(time.process_time() - started, 1)}

    def metrics(self, name: str, model: Any) -> dict[str, Any]:
        """Every metric of a model; the twin, which is the reference, is measured beside it."""
        unlearned = self.ground.load("retrained") if name == "base" else model
        base = None if isinstance(unlearned, PeftModel) else self.ground.load("base")
        report = evaluate_unlearning(
            unlearned,
            self.ground.suite,
            processing_class=self.ground.tokenizer,
            base_model=base,
            retrained_model=self.ground.load("retrained"),
            max_examples=self.args.num_measured,
            batch_size=40,
            max_new_tokens=40,
            cache_dir=self.args.output_dir / "answers",
        )
        own: Any = "base" if name == "base" else "unlearned"
        means = {
            f"{part}_{metric}": interval.mean
            for part, scores in report.scores[own].items()
            for metric, interval in scores.metrics.items()
        }
        return {"means": means | dict(report.metrics[own]), "share": report.cost["adapter_share"]}

    def attacked(self, key: tuple[str, int], model: Any, attack: str) -> dict[str, Any]:
        """The scores before and after an attack; or why there are none."""
        if key not in self._before:
            self._before[key] = self.score(model)
        name, _, rows = attack.partition(", ")
        options = self.options(name, rows, model)
        try:
            result = run_attack(name, model, score=self.score, before=self._before[key], **options)  # type: ignore[arg-type]
        except NotApplicableError as error:
            return {"refused": str(error)}
        return {"before": dict(result.before), "after": dict(result.after), "curve": [*map(dict, result.curve)]}

    def options(self, attack: str, rows: str, model: Any) -> dict[str, Any]:
        """The budgets, equal for all models."""
        trained = {"processing_class": self.ground.tokenizer}
        match attack:
            case "relearning":
                return trained | {"dataset": self.ground.learned[rows], "steps": (6, 12, 24)}
            case "soft_prompt":
                return trained | {"dataset": self.ground.learned["forget rows"], "steps": (20, 40)}
            case "int8" | "int4":
                return {"group_size": 64}
            case "paraphrase":
                return {"column": OTHER_PROMPT}
            case "few_shot":
                return {"examples": [(row["prompt"], row["completion"]) for row in self.ground.retain.select(range(2))]}
            case "expert_forcing":
                return {"base": None if isinstance(model, PeftModel) else self.ground.load("base")}
            case "silenced_expert":  # of a model that edits none, the one that UOE edits
                own = model.active_peft_config if isinstance(model, PeftModel) else None
                return {} if isinstance(own, UOEConfig) else {"experts": self.targets()}
            case _:
                return {}

    def model(self, name: str, seed: int) -> Any:
        """A model of the card, trained where it is not there yet."""
        if (name, seed) in self._loaded:
            return self._loaded[name, seed]
        if name in ("base", "retrained"):
            model: Any = self.ground.load(name)
        else:
            folder = self.args.output_dir / f"{name.removesuffix(', weaker').replace(' ', '_')}_{seed}"
            if not (folder / "done.json").exists():
                self.unlearn(name.removesuffix(", weaker"), seed, folder)
            # From disk: a copy of a model that was trained would go on calling the original.
            if name == "all parameters":
                model = load(folder)
            else:
                model = PeftModel.from_pretrained(self.ground.load("base"), folder).eval()
            if name in ("one expert", "2 of each layer", WEAKER):
                chosen = json.loads((folder / "done.json").read_text())["strength"]
                model.base_model.set_strength(chosen if name == WEAKER else 1.0)
        self._loaded[name, seed] = model
        return model

    def unlearn(self, name: str, seed: int, folder: Path) -> None:
        """Train one model and save it, with the seconds that it took and the strength that was chosen."""
        set_seed(seed)
        base = self.ground.load("base")
        trainer = UnlearningTrainer(
            model=base,
            args=training_arguments(folder, rate=RATES[name], seed=seed, calibrate=name == "one expert"),
            train_dataset=self.ground.forget,
            retain_dataset=self.ground.retain,
            processing_class=self.ground.tokenizer,
            peft_config=self.adapter(name, base),
        )
        started = time.process_time()
        trainer.train()
        seconds = round(time.process_time() - started, 1)
        trainer.save_model(str(folder))
        choice = trainer.strength_choice
        content = {"seconds": seconds, "strength": 1.0 if choice is None else choice.scale}
        (folder / "done.json").write_text(json.dumps(content))
        print(name, seed, content, flush=True)

    def targets(self) -> list[tuple[int, int]]:
        """The expert of "one expert" with the first seed."""
        config = UOEConfig.from_pretrained(str(self.args.output_dir / f"one_expert_{self.args.seeds[0]}"))
        return list(config.target_experts)

    def adapter(self, name: str, base: Any) -> Any:
        """What is trained; None: all parameters."""
        match name:
            case "all parameters":
                return None
            case "LoRA":
                return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        found = attribute_experts(
            base,
            self.ground.forget,
            processing_class=self.ground.tokenizer,
            score="contrast",
            retain_dataset=self.ground.retain,
            batch_size=50,
            show_progress=False,
        )
        return UOEConfig(target_experts=found.top(1) if name == "one expert" else found.top(2, strategy="each_layer"))


def training_arguments(folder: Path, *, rate: float, seed: int, calibrate: bool) -> UnlearningConfig:
    """Those of the demo."""
    return UnlearningConfig(
        str(folder),
        forget_loss="npo",
        beta=0.05,
        alternative_weight=1.0,
        retain_weight=8.0,
        calibrate="retain" if calibrate else False,
        calibrate_metric="probability",
        calibrate_retain_share=0.99,
        learning_rate=rate,
        lr_scheduler_type="linear",
        max_steps=200,
        per_device_train_batch_size=8,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=200,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )


def tables(runs: list[dict[str, Any]]) -> str:
    """Metrics and attacks as Markdown, means over seeds."""
    models = [model for model in MODELS if any(run["model"] == model for run in runs)]
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["attack"], run["model"]), []).append(run)
    measured = [own for (attack, _), own in cells.items() if attack == METRICS]
    names = list(dict.fromkeys(name for own in measured for run in own for name in run["means"]))
    rows = [
        [name, *(mean([run["means"].get(name) for run in cells.get((METRICS, model), ())]) for model in models)]
        for name in names
    ]
    rows.append(["share", *(mean([run["share"] for run in cells.get((METRICS, model), ())]) for model in models)])
    before = [["none", *(cell([run for run in runs if run["model"] == model], "before") for model in models)]]
    present = [attack for attack in ATTACKS if any((attack, model) in cells for model in models)]
    attacks = before + [[a, *(cell(cells.get((a, model), []), "after") for model in models)] for a in present]
    return "\n\n".join(table([what, *models], body) for what, body in (("metric", rows), ("attack", attacks))) + "\n"


def mean(values: list[float | None]) -> str:
    """Mean over seeds; empty where there is none."""
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3g}" if known else ""


def cell(runs: list[dict[str, Any]], when: str) -> str:
    """Forget / retain ROUGE-L, means over seeds; of a sweep at each scale."""
    known = [run for run in runs if when in run]
    if not known:
        return "n/a" if any("refused" in run for run in runs) else ""
    sweep = when == "after" and "scale" in known[0]["after"]
    points = [[run["curve"][place] for run in known] for place in range(1, len(known[0]["curve"]))] if sweep else None
    pairs = [
        " / ".join(f"{fmean(p[f'{role}_rouge_l_recall'] for p in own):.2f}" for role in ("forget", "retain"))
        for own in (points or [[run[when] for run in known]])
    ]
    return ", ".join(pairs)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
