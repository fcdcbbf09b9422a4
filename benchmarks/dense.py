"""Groups of neurons of a dense model against LoRA and full training, on a ground that `dense_grounds.py` wrote.

    python benchmarks/dense.py --ground outputs/dense_small [--seeds 0 1] [--minutes 60]
    python benchmarks/dense.py --ground outputs/dense_smollm --bf16 true --steps 20 --batch_size 4 \
        --losses "hidden 0.07" --factors 0.4 2

The neurons are put into 8 groups a layer, by clustering on the rows that training reads ("clustered") or by lot
("random groups"), and one group of one layer is trained, the one that `contrast` ranks first or any, or several. All
methods have NPO (beta 0.05) as the forget loss, with refusals beside where the forget rows have them, and `nll` or
`embed_diff` after the last layer ("hidden") as the retain loss, with the weight that the loss's name ends in. What was
trained in groups is merged and written back, and the ordinary dense model, read from disk, is what is asked.

All forget rows are trained on, every fourth can be relearned (40 of them at most), the others are asked; of the retain
rows half are trained on and others asked, 300 at most. A third of the asked rows are for validation, the rest is
reported: ROUGE-L recall of greedy answers. "Relearned" (`--relearn`): greatest forget score after 6, 12, 18 and 24
steps of all weights on the rows for that. "Text": nats a token of the ground's plain text, where it has one.

Of the same multiples of each part's usual rate that one counts whose run with seed 0 has the greatest difference of
retain and forget on the validation rows. Further seeds, of groups and training, take that rate alone. Runs are appended
to `runs.jsonl` and not repeated; `--minutes 0` prints the table.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from dense_grounds import TEXT
from peft import LoraConfig, PeftConfig
from resumed import Run, Runs
from smollm_moe import text_nll
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging
from trials import HALVES, spread

from uoe_peft import ExpertAttribution, UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.cli.loading import load_rows
from uoe_peft.dense import NeuronGroups, cluster_neurons, factorize, to_dense
from uoe_peft.dense.layers import num_neurons
from uoe_peft.evaluation.attacks import relearning
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.evaluation.questions import questions_of

NUM_GROUPS = 8
# What is trained, and its usual rate.
PARTS = {
    "clustered, contrast": 5e-3,
    "random groups, contrast": 5e-3,
    "clustered, random": 5e-3,
    "clustered, contrast, 2 of each layer": 3e-3,
    "clustered, contrast, best 8": 3e-3,
    "LoRA": 3e-3,
    "all parameters": 5e-4,
}
RETAIN_LOSSES: dict[str, dict[str, Any]] = {
    "nll": {"retain_loss": "nll"},
    "hidden": {"retain_loss": "embed_diff", "rmu_layer": -1},  # after the last layer
}
COLUMNS = ("forget", "retain", "relearned", "text")
Score = list[float]  # of the validation rows, and of the others


@dataclass
class DenseArguments:
    """What to run, where, for how long."""

    ground: Path = field(metadata={"help": "Folder that dense_grounds.py wrote."})
    output_dir: Path = field(default=Path("outputs/dense"), metadata={"help": "Where runs go."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "What is trained."})
    losses: list[str] = field(
        default_factory=lambda: ["hidden 0.1", "nll 8"], metadata={"help": "Retain losses with their weights."}
    )
    factors: list[float] = field(default_factory=lambda: [0.5, 1.5, 4.0], metadata={"help": "Of the usual rates."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the unlearning and of the groups."})
    steps: int = field(default=100, metadata={"help": "Of the unlearning."})
    batch_size: int = field(default=8, metadata={"help": "Forget rows a step, and retain rows."})
    relearn: bool = field(default=False, metadata={"help": "Whether to attack what was unlearned."})
    bf16: bool = field(default=False, metadata={"help": "Multiply in bfloat16, where that is fast."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this."})


def main() -> None:
    """Run what is not there yet, and print the table."""
    (args,) = HfArgumentParser(DenseArguments).parse_args_into_dataclasses()
    for names, known in ((args.parts, PARTS), ([loss.split()[0] for loss in args.losses], RETAIN_LOSSES)):
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"unknown {unknown}; use some of {list(known)}")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs, ground = Runs(args.output_dir, minutes=args.minutes), Ground(args)
    for key in runs.missing(planned(args, runs)):
        scores = ground.unlearn(**key) if key["part"] != "base" else ground.scores(args.ground / "base")
        runs.keep(key | scores)
    print(table(runs))


def planned(args: DenseArguments, runs: list[Run]) -> Iterator[Run]:
    """Each run's part, loss, rate and seed; `runs` grows meanwhile, and the first seed's choose the others' rates."""
    yield {"part": "base", "loss": "", "rate": 0.0, "seed": 0}
    for seed in args.seeds:
        for loss in args.losses:
            for part in args.parts:
                tried = [float(f"{PARTS[part] * factor:.6g}") for factor in args.factors]
                rates = tried if seed == 0 else [chosen_rate(part, loss, runs)]
                yield from ({"part": part, "loss": loss, "rate": rate, "seed": seed} for rate in rates)


def chosen_rate(part: str, loss: str, runs: list[Run]) -> float:
    """The rate whose run with seed 0 forgets most of what it does not keep, on validation rows."""
    own = [run for run in runs if (run["part"], run["loss"], run["seed"]) == (part, loss, 0)]
    if not own:
        raise ValueError(f"run seed 0 of {part!r} with {loss!r} first: it chooses the rate")
    return float(max(own, key=lambda run: run["retain"][0] - run["forget"][0])["rate"])


class Ground:
    """A dense model that knows its rows: which are trained on, relearned and asked."""

    def __init__(self, args: DenseArguments) -> None:
        self.args = args
        self.base = args.ground / "base"
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.forget, others = (load_rows(str(args.ground / f"{role}.jsonl")) for role in ("forget", "retain"))
        halves = others.train_test_split(test_size=0.5, seed=0)
        self.retain = halves["train"]
        self.learned_again = self.forget.select(list(range(0, len(self.forget), 4))[:40])
        asked = {
            "forget": self.forget.select([i for i in range(len(self.forget)) if i % 4]),
            "retain": halves["test"].select(range(min(300, len(halves["test"])))),
        }
        self.asked = {role: self._questions(rows, role) for role, rows in asked.items()}
        text = args.ground / TEXT
        self.text = text.read_text(encoding="utf-8") if text.exists() else None

    def _questions(self, rows: Dataset, name: str) -> Any:
        return questions_of(rows, self.tokenizer, max_length=None, max_examples=None, seed=0, name=name)

    def load(self, folder: Path, *, trained: bool = False) -> Any:
        """A dense model from disk; one that is trained has its weights in float32."""
        dtype = torch.bfloat16 if self.args.bf16 and not trained else torch.float32
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def unlearn(self, part: str, loss: str, rate: float, seed: int) -> Run:
        """Train, write the dense model to disk, and score what is read from there."""
        set_seed(seed)
        model = self.load(self.base, trained=True)
        config, targets = self.adapter(part, model, seed)
        kind, weight = loss.split()
        kept = {**RETAIN_LOSSES[kind], "retain_weight": float(weight)}
        with tempfile.TemporaryDirectory() as folder:
            trainer = UnlearningTrainer(
                model=model,
                args=self.training_arguments(folder, learning_rate=rate, seed=seed, **kept),
                train_dataset=self.forget,
                retain_dataset=self.retain,
                processing_class=self.tokenizer,
                peft_config=config,
            )
            started = time.process_time()
            trainer.train()
            seconds = round(time.process_time() - started, 1)
            count = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
            merged: Any = trainer.model.merge_and_unload() if config else trainer.model
            (to_dense(merged) if targets else merged).save_pretrained(Path(folder) / "dense")
            scores = self.scores(Path(folder) / "dense")
        return {"targets": targets, "trained": count, "seconds": seconds, **scores}

    def training_arguments(self, folder: str, **own: Any) -> UnlearningConfig:
        """Those of the demo but for the retain loss, and that no strength is chosen."""
        return UnlearningConfig(
            folder,
            forget_loss="npo",
            beta=0.05,
            alternative_weight=float("alternative" in self.forget.column_names),
            lr_scheduler_type="linear",
            calibrate=False,
            max_steps=self.args.steps,
            per_device_train_batch_size=self.args.batch_size,
            bf16=self.args.bf16,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=self.args.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **own,
        )

    def adapter(self, part: str, model: Any, seed: int) -> tuple[PeftConfig | None, list[Any]]:
        """What is trained (None: all parameters), and its groups; puts the model's neurons into these."""
        match part.split(", "):
            case ["all parameters"]:
                return None, []
            case ["LoRA"]:
                lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
                return lora, []
            case [partition, score, *rest]:
                groups, found = self.found(partition, score, seed)
                two = "2 of each layer" in rest
                targets = found.top(2, strategy="each_layer") if two else found.top(8 if rest else 1)
                factorize(model, groups)
                return UOEConfig(target_experts=targets, train_router=False), targets
        raise ValueError(f"unknown part {part!r}")

    @cache  # noqa: B019 the ground lives as long as the script
    def found(self, partition: str, score: Any, seed: int) -> tuple[NeuronGroups, ExpertAttribution]:
        """The neurons in groups, by what they do on the rows or by lot, and how these are ranked."""
        model = self.load(self.base)
        if partition == "clustered":
            read = (self.forget, self.retain)
            text = concatenate_datasets([rows.select_columns(["prompt", "completion"]) for rows in read])
            groups = cluster_neurons(
                model,
                text,
                processing_class=self.tokenizer,
                num_groups=NUM_GROUPS,
                batch_size=50,
                seed=seed,
                show_progress=False,
            )
        else:
            groups = NeuronGroups.random(num_neurons(model), NUM_GROUPS, seed=seed)
        found = attribute_experts(
            factorize(model, groups),
            self.forget,
            processing_class=self.tokenizer,
            score=score,
            retain_dataset=self.retain,
            batch_size=50,
            seed=seed,
            show_progress=False,
        )
        return groups, found

    def scores(self, folder: Path) -> Run:
        """ROUGE-L of the forget and retain rows, relearned or not, and how likely plain text is."""
        model = self.load(folder)
        forget = self.ask(model, "forget")
        found: Run = {"forget": list(forget.values()), "retain": list(self.ask(model, "retain").values())}
        if self.args.relearn:
            again = relearning(
                model,
                self.learned_again,
                processing_class=self.tokenizer,
                score=lambda attacked, **_: self.ask(attacked, "forget"),
                before=forget,
                steps=[6, 12, 18, 24],
            ).after
            found["relearned"] = [again[name] for name in forget]
        if self.text is not None:
            found["text"] = [text_nll(model, self.tokenizer, self.text)] * len(HALVES)
        return {name: [round(value, 4) for value in values] for name, values in found.items()}

    def ask(self, model: Any, role: str) -> dict[str, float]:
        """Mean ROUGE-L of the validation rows, a third of all, and of the others."""
        asked = self.asked[role]
        answers = greedy_answers(
            model, asked.prompts, tokenizer=self.tokenizer, max_new_tokens=48, batch_size=150, desc=role
        )
        rouge = rouge_l_recall(answers, asked.references)
        others = [value for place, value in enumerate(rouge) if place % 3]
        return {f"{role}_{half}": fmean(values) for half, values in zip(HALVES, (rouge[::3], others), strict=True)}


def table(runs: list[Run]) -> str:
    """Means over seeds at the chosen rates, as Markdown; a score of some seeds alone says of how many."""
    columns = [column for column in COLUMNS if any(column in run for run in runs)]
    lines = [
        f"| trained | retain loss | rate | layer:group (seed 0) | parameters | {' | '.join(columns)} | CPU s | seeds |",
        "|---" * (len(columns) + 7) + "|",
    ]
    for part, loss in dict.fromkeys((run["part"], run["loss"]) for run in runs):
        rate = chosen_rate(part, loss, runs)
        own = [run for run in runs if (run["part"], run["loss"], run["rate"]) == (part, loss, rate)]
        cells = " | ".join(cell([run[column][1] for run in own if column in run], len(own)) for column in columns)
        first = {"targets": [], "trained": 0, "seconds": 0.0, **own[0]}
        targets = " ".join(f"{layer}:{group}" for layer, group in first["targets"])
        ends = f"{first['seconds']:.0f} | {len(own)} |"
        lines.append(f"| {part} | {loss} | {rate:g} | {targets} | {first['trained']:,} | {cells} | {ends}")
    return "\n".join(lines)


def cell(values: list[float], num_runs: int) -> str:
    """A score's mean and deviation."""
    return "" if not values else spread(values) + ("" if len(values) == num_runs else f" ({len(values)})")


if __name__ == "__main__":
    main()
