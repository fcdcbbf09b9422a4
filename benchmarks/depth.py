"""How much of what was forgotten comes back, against how many experts of which layers were edited, on the testbed.

    python benchmarks/depth.py [--output_dir outputs/depth] [--seeds 0 1 2] [--minutes 30]

Every run is of 200 steps of 8 + 8 rows, the rate falling linearly, with the demo's losses (NPO with refusals and 8
times the retain loss) or others: RMU with 30 times embed_diff at the last layer, alone or with refusals and nll beside.
Experts are the best of each layer by `contrast`. Afterwards, at each strength: greedy answers to 150 forget
and 300 retain rows (which training has not read), then the relearning attack of the package on 40 of the other 50
forget rows: all weights, 24 steps, looks at 6, 12, 18 and 24; the maximum counts. All forget rows are trained on; rates
were chosen by hand on a run of seed 0 each, which is part of what is reported. The retrained twin is attacked, too.

Runs are appended to `runs.jsonl` and not repeated; `--minutes 0` prints the table.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import disable_progress_bars
from peft import PeftModel
from resumed import Runs
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import ExpertAttribution, UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.evaluation import SuiteScore, plain_suite
from uoe_peft.evaluation.attacks.relearning import relearning
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

Pairs = list[tuple[int, int]]
# What is trained, by which rate; None: all parameters.
PARTS: dict[str, tuple[Callable[[ExpertAttribution], Pairs] | None, float]] = {
    "one expert": (lambda found: found.top(1), 5e-3),
    "1 of each layer": (lambda found: found.top(1, strategy="each_layer"), 3e-3),
    "2 of each layer": (lambda found: found.top(2, strategy="each_layer"), 3e-3),
    "4 of each layer": (lambda found: found.top(4, strategy="each_layer"), 2e-3),
    "4 of the upper two layers": (lambda found: found.top(4, strategy="each_layer", exclude_layers=(0, 1)), 2e-3),
    "all parameters": (None, 5e-4),
}


DEMO = "NPO + refusals"
NPO = {"forget_loss": "npo", "beta": 0.05, "alternative_weight": 1.0, "retain_weight": 8.0}
RMU = {"forget_loss": "rmu", "retain_loss": "embed_diff", "retain_weight": 30.0, "rmu_layer": 3}
# What is trained for, and what the rates of PARTS are multiplied with.
LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    DEMO: (NPO, 1.0),
    "RMU": (RMU, 1.0),
    "RMU, twice the rate": (RMU, 2.0),
    "RMU, beta 10": ({**RMU, "beta": 10.0}, 1.0),
    "RMU + refusals": ({**RMU, "alternative_weight": 1.0}, 1.0),
}


@dataclass
class DepthArguments:
    """What to run, for how long."""

    output_dir: Path = field(default=Path("outputs/depth"), metadata={"help": "Where runs go."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "What is trained."})
    losses: list[str] = field(default_factory=lambda: [DEMO], metadata={"help": "What is trained for."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    strengths: list[float] = field(default_factory=lambda: [1.0, 0.85], metadata={"help": "Of the adapter."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this."})


def main() -> None:
    """Run what is not there yet, and print the table."""
    (args,) = HfArgumentParser(DepthArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs, ground = Runs(args.output_dir, minutes=args.minutes), None
    wanted = [(DEMO, "retrained", 0), *product(args.losses, args.parts, args.seeds)]
    for key in runs.missing(dict(zip(("loss", "part", "seed"), own, strict=True)) for own in wanted):
        ground = ground or Ground()
        own = ground.attacked_twin() if key["part"] == "retrained" else ground.unlearn(**key, strengths=args.strengths)
        for run in own:
            runs.keep(run)
    print(table(runs))


class Ground:
    """The testbed, split into what is trained on and what is asked."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
        self.forget = load_facts([FORGET_TOPIC])
        halves = load_facts([t for t in TOPICS if t != FORGET_TOPIC]).train_test_split(test_size=0.5, seed=0)
        self.retain = halves["train"]
        learned, asked = range(0, len(self.forget), 4), [i for i in range(len(self.forget)) if i % 4]
        self.learned_again = self.forget.select(list(learned)[:40])
        suite = plain_suite(self.forget.select(asked), halves["test"].select(range(300)))
        self.score = SuiteScore(suite, self.tokenizer, batch_size=100, max_new_tokens=48)

    def attacked_twin(self) -> list[dict[str, Any]]:
        """The retrained model, as a row."""
        return [{"loss": DEMO, "part": "retrained", "seed": 0, "strength": 1.0, **self._scores(load("retrained"))}]

    def unlearn(self, loss: str, part: str, seed: int, strengths: list[float]) -> list[dict[str, Any]]:
        """A row for each strength; a model that is trained in full has no other than 1."""
        set_seed(seed)
        base = load("base")
        choose, rate = PARTS[part]
        found = attribute_experts(
            base,
            self.forget,
            processing_class=self.tokenizer,
            score="contrast",
            retain_dataset=self.retain,
            batch_size=50,
            show_progress=False,
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer = UnlearningTrainer(
                model=base,
                args=training_arguments(folder, loss=loss, rate=rate, seed=seed),
                train_dataset=self.forget,
                retain_dataset=self.retain,
                processing_class=self.tokenizer,
                peft_config=UOEConfig(target_experts=choose(found)) if choose else None,
            )
            started = time.process_time()
            trainer.train()
            seconds = round(time.process_time() - started, 1)
            row: dict[str, Any] = {"loss": loss, "part": part, "seed": seed, "seconds": seconds}
            trainer.save_model(folder)
            rows = []
            # From disk: a copy of a model that was trained would go on calling the original.
            for strength in strengths if choose else [1.0]:
                if choose:
                    model = PeftModel.from_pretrained(load("base"), folder).eval()
                    model.base_model.set_strength(strength)
                else:
                    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
                rows.append({**row, "strength": strength, **self._scores(model)})
                print(rows[-1], flush=True)
        return rows

    def _scores(self, model: Any) -> dict[str, float]:
        before = self.score(model)
        again = relearning(
            model,
            self.learned_again,
            processing_class=self.tokenizer,
            score=self.score,
            steps=(6, 12, 18, 24),
            before=before,
        )
        # By name: the suite's own, such as "forget_rouge_l_recall".
        return {**{name: round(v, 4) for name, v in before.items()}, "relearned": round(strongest(again.curve), 4)}


def strongest(curve: Any) -> float:
    """Greatest forget ROUGE-L after the first step of relearning."""
    return max(look["forget_rouge_l_recall"] for look in curve if look["step"])


def load(name: Any) -> Any:
    """A checkpoint of the testbed, in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=torch.float32).eval()


def training_arguments(folder: str, *, loss: str, rate: float, seed: int) -> UnlearningConfig:
    """Those of the demo but for the loss, and that no strength is chosen."""
    own, factor = LOSSES[loss]
    return UnlearningConfig(
        folder,
        **own,
        calibrate=False,
        learning_rate=rate * factor,
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


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, as Markdown."""
    lines = ["| loss | trained | strength | forget | retain | relearned | CPU s | seeds |", "|---" * 8 + "|"]
    for loss, part, strength in dict.fromkeys((run["loss"], run["part"], run["strength"]) for run in runs):
        rows = [run for run in runs if (run["loss"], run["part"], run["strength"]) == (loss, part, strength)]
        means = [
            fmean(row[name] for row in rows) for name in ("forget_rouge_l_recall", "retain_rouge_l_recall", "relearned")
        ]
        seconds = f"{fmean(row['seconds'] for row in rows):.0f}" if "seconds" in rows[0] else ""
        lines.append(
            f"| {loss} | {part} | {strength:g} | "
            + " | ".join(f"{m:.3f}" for m in means)
            + f" | {seconds} | {len(rows)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
