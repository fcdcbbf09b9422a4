"""Attacks on the testbed: what a base model, its retrained twin, a UOE adapter and full fine-tuning say under each.

    python benchmarks/attacks.py [--output_dir outputs/attacks] [--minutes 60] [--attacks relearning int4]

The adapter is that of `uoe-peft demo`, in float32; full fine-tuning has the same losses, rows and steps at a rate of
its own. All four models are attacked with equal budgets: the twin, which never saw the forget topic, says what an
attack "recovers" by guessing, the base what there is to recover. A tenth of the forget rows is given to the attacks
that learn, and never asked. Each attack is appended to `attacks.jsonl` and not repeated, so that a run that was stopped
goes on where it was; `--minutes 0` only writes the table, `attacks.md`: forget / retain ROUGE-L, forget the maximum
over what an attack tried.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.data import collate
from uoe_peft.evaluation.attacks import AdapterAttack, AttackName, run_attack
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import answer_probability, rouge_l_recall
from uoe_peft.evaluation.questions import questions_of
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

MODELS = ("base", "retrained", "UOE", "all parameters")
# Two attacks by relearning; the other names are the attacks' own.
ATTACKS = (
    "relearning, forget rows",
    "relearning, retain rows",
    *(n for n in get_args(AttackName) if n != "relearning"),
)
PARAPHRASE = "paraphrased_prompt"


@dataclass
class AttackArguments:
    """How much is asked, how long it may take."""

    output_dir: Path = field(default=Path("outputs/attacks"), metadata={"help": "Where models, runs and table go."})
    minutes: float = field(default=60.0, metadata={"help": "No attack begins after this; start again to go on."})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "Columns of the table."})
    attacks: list[str] = field(default_factory=lambda: list(ATTACKS), metadata={"help": "Rows of the table."})
    num_asked: int = field(default=24, metadata={"help": "Forget rows that are asked, and as many retain rows."})
    num_gcg: int = field(default=3, metadata={"help": "Forget rows that gcg attacks, and is asked."})
    full_rate: float = field(default=3e-4, metadata={"help": "Learning rate of full fine-tuning."})
    seed: int = field(default=0, metadata={"help": "Of all draws."})


class Score:
    """Mean ROUGE-L recall of greedy answers and mean answer probability, of some rows of both sets."""

    def __init__(self, rows: Mapping[str, Dataset], tokenizer: Any) -> None:
        self._rows, self._tokenizer = rows, tokenizer

    @torch.inference_mode()
    def __call__(
        self, model: Any, *, prompts: Callable[[str], str] | None = None, column: str | None = None
    ) -> dict[str, float]:
        """Ask a model; see `uoe_peft.evaluation.attacks.Score`."""
        scores: dict[str, float] = {}
        for role, rows in self._rows.items():
            worded = [row | {"prompt": (prompts or str)(row[column or "prompt"])} for row in rows]
            asked = questions_of(
                Dataset.from_list(worded), self._tokenizer, max_length=None, max_examples=None, seed=0, name=role
            )
            answers = greedy_answers(
                model, asked.prompts, tokenizer=self._tokenizer, max_new_tokens=48, batch_size=24, desc=role
            )
            batch = collate(asked.examples, pad_token_id=0)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
            scores[f"{role}_rouge"] = fmean(rouge_l_recall(answers, asked.references))
            scores[f"{role}_probability"] = float(answer_probability(logits, batch["labels"]).mean())
        return scores


@dataclass(frozen=True)
class Ground:
    """What all attacks share."""

    tokenizer: Any
    forget: Dataset  # all of it, to unlearn
    retain: Dataset  # the half that training sees
    learned: Dataset  # forget rows for attacks that learn
    asked: dict[str, Dataset]
    targets: list[tuple[int, int]]


def main() -> None:
    """Run what has not been run, then write the table."""
    (args,) = HfArgumentParser(AttackArguments).parse_args_into_dataclasses()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)  # a second one gains nothing on so small a model, and costs much on a busy machine
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, started = args.output_dir / "attacks.jsonl", time.perf_counter()
    runs = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    done = {(run["model"], run["attack"]) for run in runs}
    ground = prepare(args)
    for name in args.models:
        model: Any = None
        for attack in args.attacks:
            if (name, attack) in done or (name != "UOE" and attack in get_args(AdapterAttack)):
                continue
            if time.perf_counter() - started > args.minutes * 60:
                print(f"{args.minutes} minutes are over; start again to go on")
                break
            model = model if model is not None else build(name, ground, args)
            runs.append(attacked(name, model, attack, ground, args))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(runs[-1]) + "\n")
            print(f"{name}, {attack}: {cell(runs[-1])} ({runs[-1]['seconds']} s)", flush=True)
    (args.output_dir / "attacks.md").write_text(table(runs, args), encoding="utf-8")
    print(table(runs, args))


def prepare(args: AttackArguments) -> Ground:
    """The sets, and the expert that the demo chooses."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
    forget = load_facts([FORGET_TOPIC])
    halves = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC]).train_test_split(0.5, seed=0)
    parts = forget.train_test_split(len(forget) // 10, seed=args.seed)
    asked = {"forget": parts["train"], "retain": halves["test"]}
    attribution = attribute_experts(load("base"), forget, processing_class=tokenizer, batch_size=50, seed=args.seed)
    return Ground(
        tokenizer=tokenizer,
        forget=forget,
        retain=halves["train"],
        learned=parts["test"],
        asked={role: some(rows, args.num_asked, args.seed) for role, rows in asked.items()},
        targets=attribution.top(1),
    )


def some(rows: Dataset, number: int, seed: int) -> Dataset:
    """A sample, with the paraphrased question as a prompt."""

    def paraphrased(row: dict[str, Any]) -> dict[str, str]:
        return {PARAPHRASE: f"Question: {row['paraphrased_question']}\nAnswer:"}

    return rows.shuffle(seed=seed).select(range(number)).map(paraphrased)


def load(name: Any) -> Any:
    """A bundled checkpoint."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=torch.float32).eval()


def build(name: str, ground: Ground, args: AttackArguments) -> Any:
    """A model of the table; those that have to be trained are kept."""
    if name in ("base", "retrained"):
        return load(name)
    folder = args.output_dir / name.replace(" ", "_")
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        set_seed(args.seed)
        unlearn(name, ground, args).save_pretrained(folder)
    if name == "UOE":
        return PeftModel.from_pretrained(load("base"), folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def unlearn(name: str, ground: Ground, args: AttackArguments) -> Any:
    """The demo's training: NPO + 4 nll, for an expert with the anchor, over six epochs."""
    trainer = UnlearningTrainer(
        model=load("base"),
        args=UnlearningConfig(
            output_dir=str(args.output_dir / "training"),
            forget_loss="npo",
            beta=0.05,
            retain_loss="nll",
            retain_weight=4.0,
            anchor_weight=1.0 if name == "UOE" else 0.0,
            learning_rate=5e-3 if name == "UOE" else args.full_rate,
            num_train_epochs=6,
            per_device_train_batch_size=8,
            use_cpu=True,
            dataloader_pin_memory=False,
            log_routing=False,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=ground.forget,
        retain_dataset=ground.retain,
        processing_class=ground.tokenizer,
        peft_config=UOEConfig(target_experts=ground.targets) if name == "UOE" else None,
    )
    trainer.train()
    return trainer.model


def attacked(name: str, model: Any, attack: str, ground: Ground, args: AttackArguments) -> dict[str, Any]:
    """One attack on one model, as a line of the log."""
    rows = ground.asked
    if attack == "gcg":  # the search is dear, and only the rows that it was made for are asked with it
        rows = {role: part.select(range(args.num_gcg)) for role, part in rows.items()}
    started = time.process_time()
    result = run_attack(
        attack.split(",")[0],  # type: ignore[arg-type]
        model,
        score=Score(rows, ground.tokenizer),
        **options(name, attack, rows, ground, args),
    )
    seconds = round(time.process_time() - started, 1)
    return {"model": name, "attack": attack, "seconds": seconds, **result.to_dict()}


def options(
    name: str, attack: str, rows: Mapping[str, Dataset], ground: Ground, args: AttackArguments
) -> dict[str, Any]:
    """The budgets, equal for all models."""
    learned = {"processing_class": ground.tokenizer, "seed": args.seed}
    match attack:
        case "relearning, forget rows":
            return learned | {"dataset": ground.learned, "steps": (6, 12, 24)}
        case "relearning, retain rows":
            benign = ground.retain.select(range(len(ground.learned)))
            return learned | {"dataset": benign, "steps": (6, 12, 24)}
        case "soft_prompt":
            return learned | {"dataset": ground.learned, "steps": (20, 40), "num_virtual_tokens": 8}
        case "gcg":
            budget = {"num_rows": args.num_gcg, "num_steps": 10, "num_tokens": 8, "search_width": 32}
            return learned | {"dataset": rows["forget"], **budget}
        case "int8" | "int4":
            return {"group_size": 64}
        case "paraphrase":
            return {"column": PARAPHRASE}
        case "few_shot":
            return {"examples": [(row["prompt"], row["completion"]) for row in ground.retain.select(range(2))]}
        case "expert_forcing":
            return {"base": None if name == "UOE" else load("base")}
        case "silenced_expert":
            return {"experts": ground.targets}
        case _:
            return {}


def cell(run: Mapping[str, Any]) -> str:
    """Forget / retain ROUGE-L under an attack; of a sweep at each scale."""
    points = run["curve"][1:] if run["attack"] == "scale_sweep" else [run["after"]]
    return ", ".join(f"{point['forget_rouge']:.2f} / {point['retain_rouge']:.2f}" for point in points)


def table(runs: list[dict[str, Any]], args: AttackArguments) -> str:
    """All attacks and models, as Markdown."""
    cells = {(run["model"], run["attack"]): cell(run) for run in runs}
    plain = {run["model"]: run["before"] for run in runs if run["attack"] != "gcg"}
    cells |= {
        (name, "none"): f"{scores['forget_rouge']:.2f} / {scores['retain_rouge']:.2f}" for name, scores in plain.items()
    }
    lines = [["attack", *args.models], ["---"] * (len(args.models) + 1)]
    lines += [[attack, *(cells.get((name, attack), "") for name in args.models)] for attack in ("none", *args.attacks)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
