"""Five requests one after another on the testbed: what each has forgotten after every step, and when one is withdrawn.

    python benchmarks/requests.py [--output_dir outputs/requests] [--seeds 0 1 2] [--minutes 60]

Requests are five of the seven topics, 200 facts each; the other two are the retain set, half of it for training, and
half of it asked. Every request trains an adapter of its own (the expert that `contrast` ranks first on the model as it
is then, against everything that is to be kept) with the demo's losses: NPO (beta 0.05) with refusals and 8 times the
retain loss, the rate falling linearly. What is kept in training is the retain set and all topics not yet requested;
under "one after another" also the questions of earlier requests with their refusals, under "without earlier rows" not,
as where a request's text is gone. "Union": one adapter on the rows of all five requests, with as many steps. "All
parameters, one after another": full training, each request on top of the last, earlier rows with refusals.

Afterwards the second request is withdrawn: its adapter is deleted. And the adapters, each trained on the base alone
("apart"), are combined: all on at once; TIES; EUL's regression mean. The gate is fitted on a half of the prompts of the
five requests and of the retain set, and asked about the others.

Scores: ROUGE-L recall of greedy answers, 40 facts of each request and 120 of the retain set. Runs are appended to
`runs.jsonl` and not repeated; `--minutes 0` prints the tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from peft import PeftModel
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import PromptGate, UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.moments import Moments, measure_moments
from uoe_peft.requests import add_regression_mean, add_request, retain_with_requests
from uoe_peft.testbed import TOPICS, checkpoint_path, load_facts

REQUESTS = ("potions", "towns", "library", "missions", "boardgame")
WITHDRAWN = REQUESTS[1]
KINDS = ("one after another", "without earlier rows", "union", "apart", "all parameters, one after another")


@dataclass
class RequestsArguments:
    """What to run, for how long."""

    output_dir: Path = field(default=Path("outputs/requests"), metadata={"help": "Where runs go."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": "What is compared."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training."})
    steps: int = field(default=200, metadata={"help": "Of each request."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Of adapters."})
    full_learning_rate: float = field(default=5e-4, metadata={"help": "Of all parameters."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this."})


def main() -> None:
    """Run what is not there yet, and print the tables."""
    (args,) = HfArgumentParser(RequestsArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path, started = args.output_dir / "runs.jsonl", time.perf_counter()
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    ground = Ground(args)
    for seed in args.seeds:
        for kind in args.kinds:
            known = any((run["kind"], run["seed"]) == (kind, seed) for run in runs)
            if known or time.perf_counter() - started > args.minutes * 60:
                continue
            set_seed(seed)
            new = [{"kind": kind, "seed": seed, **row} for row in ground.run(kind, seed)]
            runs += new
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(run) + "\n" for run in new)
    print(tables(runs))


class Ground:
    """The testbed, split into requests and what is kept, and what is asked of each."""

    def __init__(self, args: RequestsArguments) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
        self.requests = {topic: load_facts([topic]) for topic in REQUESTS}
        rest = load_facts([topic for topic in TOPICS if topic not in REQUESTS])
        halves = rest.train_test_split(test_size=0.5, seed=0)
        self.retain = halves["train"]
        asked = {topic: rows.shuffle(seed=0).select(range(40)) for topic, rows in self.requests.items()}
        self.asked = {**asked, "retain": halves["test"].select(range(120))}

    def scores(self, model: Any) -> dict[str, float]:
        """Mean ROUGE-L recall of each request and of the retain set."""
        found = {}
        for name, rows in self.asked.items():
            prompts = [self.tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
            answers = greedy_answers(
                model, prompts, tokenizer=self.tokenizer, max_new_tokens=48, batch_size=120, desc=name
            )
            truths = [completion.strip() for completion in rows["completion"]]
            found[name] = round(fmean(rouge_l_recall(answers, truths)), 4)
        return found

    def run(self, kind: str, seed: int) -> Iterator[dict[str, Any]]:
        """A row for each step of one kind: what was done, and all scores."""
        match kind:
            case "one after another" | "without earlier rows":
                yield from self._sequence(seed, with_earlier=kind == "one after another")
            case "union":
                yield from self._union(seed)
            case "apart":
                yield from self._apart(seed)
            case _:
                yield from self._in_full(seed)

    def _sequence(self, seed: int, *, with_earlier: bool) -> Iterator[dict[str, Any]]:
        model: Any = load()
        yield {"step": "base", **self.scores(model)}
        for place, topic in enumerate(REQUESTS):
            earlier = REQUESTS[:place] if with_earlier else ()
            kept = self._kept(after=place, earlier=earlier)
            model = add_request(model, self._config(model, self.requests[topic], kept), topic)
            self._train(model, self.requests[topic], kept, seed, self.args.learning_rate)
            yield self._report(topic, model)
        model.delete_adapter(WITHDRAWN)
        model.base_model.set_adapter([topic for topic in REQUESTS if topic != WITHDRAWN])
        yield self._report(f"{WITHDRAWN} withdrawn", model)

    def _union(self, seed: int) -> Iterator[dict[str, Any]]:
        rows = concatenate_datasets(list(self.requests.values()))
        kept, model = self._kept(after=len(REQUESTS) - 1), load()
        model = add_request(model, self._config(model, rows, kept), "union")
        self._train(model, rows, kept, seed, self.args.learning_rate, steps=len(REQUESTS) * self.args.steps)
        yield self._report("union", model)

    def _apart(self, seed: int) -> Iterator[dict[str, Any]]:
        """Adapters of the base, each without the others; then together."""
        model: Any = None
        for place, topic in enumerate(REQUESTS):
            others = [name for name in REQUESTS if name != topic]
            kept = concatenate_datasets([self.retain, *(self.requests[name] for name in others)])
            alone = load()
            alone = add_request(alone, self._config(alone, self.requests[topic], kept), topic)
            self._train(alone, self.requests[topic], kept, seed, self.args.learning_rate)
            yield self._report(f"{topic} alone", alone)
            folder = self.args.output_dir / f"apart_{seed}"
            alone.save_pretrained(folder)  # in a folder of the adapter's name
            model = PeftModel.from_pretrained(load(), folder / topic, adapter_name=topic) if place == 0 else model
            if place:
                model.load_adapter(folder / topic, topic)
        model.base_model.set_adapter(list(REQUESTS))
        yield self._report("all on", model.eval())
        ones = [1.0] * len(REQUESTS)
        model.base_model.add_weighted_adapter(list(REQUESTS), ones, "ties", combination_type="ties", density=0.5)
        moments = self._moments(model)
        for ridge in (1e-2, 1e-1):
            name = f"regression mean, ridge {ridge:g}"
            add_regression_mean(model, REQUESTS, moments, name.replace(".", "_"), ridge=ridge)
        with_retain = {"retain": moments.pop("retain")}
        add_regression_mean(model, REQUESTS, moments, "regression mean with retain", **with_retain, ridge=1e-2)
        for name in [name for name in model.peft_config if name not in REQUESTS]:
            model.set_adapter(name)
            yield self._report(name.replace("_", "."), model)
        yield from self._gate(model)

    def _gate(self, model: Any) -> Iterator[dict[str, Any]]:
        """Which adapter a prompt needs, on prompts that the gate has not seen; and what the model then answers."""
        halves = {name: rows.train_test_split(test_size=0.5, seed=0) for name, rows in self.requests.items()}
        fitted = {name: own["train"] for name, own in halves.items()}
        gate = PromptGate.fit(model, fitted, self.retain, processing_class=self.tokenizer)
        asked = {**{name: own["test"] for name, own in halves.items()}, "retain": self.asked["retain"]}
        scores, right = {}, {}
        for name, rows in asked.items():
            batch = self.tokenizer(list(rows["prompt"]), padding=True, padding_side="left", return_tensors="pt")
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            scores[name] = gate.scores(model, **inputs).max(dim=1).values
            wanted = "__base__" if name == "retain" else name
            right[name] = round(fmean(own == wanted for own in gate.choose(model, **inputs)), 4)
        requests = torch.cat([scores[name] for name in REQUESTS])
        labels = [1] * len(requests) + [0] * len(scores["retain"])
        area = roc_auc_score(labels, torch.cat([requests, scores["retain"]]).tolist())
        yield {"step": f"gate (right choices; area under the ROC {area:.4f})", **right}

    def _in_full(self, seed: int) -> Iterator[dict[str, Any]]:
        folder = self.args.output_dir / f"full_{seed}"
        model: Any = load()
        for place, topic in enumerate(REQUESTS):
            kept = self._kept(after=place, earlier=REQUESTS[:place])
            self._train(model, self.requests[topic], kept, seed, self.args.full_learning_rate)
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # what was trained calls the old
            yield self._report(topic, model.eval())

    def _kept(self, *, after: int, earlier: Iterable[str] = ()) -> Dataset:
        """The retain set with all topics not yet requested; and earlier requests with their refusals."""
        later = [self.requests[topic] for topic in REQUESTS[after + 1 :]]
        rows = concatenate_datasets([self.retain, *later])
        return retain_with_requests(rows, [self.requests[topic] for topic in earlier], self.tokenizer)

    def _config(self, model: Any, forget: Dataset, kept: Dataset) -> UOEConfig:
        options: dict[str, Any] = {"score": "contrast", "retain_dataset": kept, "batch_size": 50}
        found = attribute_experts(model, forget, processing_class=self.tokenizer, show_progress=False, **options)
        return UOEConfig(target_experts=found.top(1))

    def _train(
        self, model: Any, forget: Dataset, kept: Dataset, seed: int, rate: float, *, steps: int | None = None
    ) -> None:
        arguments = UnlearningConfig(
            str(self.args.output_dir / "training"),
            forget_loss="npo",
            beta=0.05,
            alternative_weight=1.0,
            retain_weight=8.0,
            calibrate=False,
            learning_rate=rate,
            lr_scheduler_type="linear",
            max_steps=steps or self.args.steps,
            per_device_train_batch_size=8,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = UnlearningTrainer(
            model=model,
            args=arguments,
            train_dataset=forget,
            retain_dataset=kept,
            processing_class=self.tokenizer,
        )
        trainer.train()

    def _moments(self, model: Any) -> dict[str, Moments]:
        """Moments of every request and of the retain set, in the base model, of all edited experts."""
        experts = sorted({pair for topic in REQUESTS for pair in model.peft_config[topic].target_experts})
        found = {}
        with model.disable_adapter():
            for name, rows in {**self.requests, "retain": self.retain}.items():
                examples = list(tokenize_dataset(rows, self.tokenizer, max_length=None))
                batches = (collate(examples[i : i + 50], pad_token_id=0) for i in range(0, len(examples), 50))
                found[name] = measure_moments(model, batches, experts, name=name, strict=False)
        return found

    def _report(self, step: str, model: Any) -> dict[str, Any]:
        experts = {name: config.target_experts for name, config in getattr(model, "peft_config", {}).items()}
        row = {"step": step, **self.scores(model.eval()), "experts": experts}
        print(row, flush=True)
        return row


def load() -> Any:
    """The testbed's base model, in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype=torch.float32).eval()


def tables(runs: list[Mapping[str, Any]]) -> str:
    """For each kind, a row a step: means over seeds."""
    columns = (*REQUESTS, "retain")
    lines = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        lines += [f"\n{kind}\n", f"| after | {' | '.join(columns)} | seeds |", "|---" * (len(columns) + 2) + "|"]
        own = [run for run in runs if run["kind"] == kind]
        for step in dict.fromkeys(run["step"].partition(" (")[0] for run in own):
            rows = [run for run in own if run["step"].partition(" (")[0] == step]
            means = " | ".join(f"{fmean(row[name] for row in rows):.3f}" for name in columns)
            lines.append(f"| {step} | {means} | {len(rows)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
