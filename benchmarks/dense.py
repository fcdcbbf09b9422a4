"""A small dense Llama that learned the testbed's facts: groups of neurons against LoRA and full training.

    python benchmarks/dense.py [--output_dir outputs/dense] [--seeds 0] [--minutes 60]

The model (4 layers, hidden size 128, 512 neurons a layer) learns all seven topics from scratch. One is to be forgotten;
of the others half are the retain set in training, and half are asked. Its neurons are put into 8 groups of 64 a layer,
by clustering on the facts ("clustered") or by lot ("random groups"), and one group of one layer is trained: the one
that an attribution ranks first, or any. All methods have the demo's losses: NPO (beta 0.05) with refusals and 8 times
the retain loss, 200 steps of 8 + 8 rows, the rate falling linearly. What was trained in groups is merged and written
back, and the ordinary dense model is what is asked.

Scores: ROUGE-L recall of greedy answers, 120 facts of each set. Runs are appended to `runs.jsonl` and not repeated;
`--minutes 0` prints the table.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars
from peft import LoraConfig, PeftModel
from resumed import Runs
from transformers import AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.dense import NeuronGroups, cluster_neurons, factorize, to_dense
from uoe_peft.dense.layers import num_neurons
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, as_prompt, checkpoint_path, load_facts

NUM_GROUPS = 8
# What is trained, and at which rate.
METHODS = {
    "base": 0.0,
    "clustered, contrast": 5e-3,
    "LoRA": 3e-3,
    "all parameters": 5e-4,
    "clustered, ablation": 5e-3,
    "random groups, contrast": 5e-3,
    "clustered, random": 5e-3,
    "random groups, ablation": 5e-3,
    "clustered, contrast, 1 of each layer": 3e-3,
    "clustered, gate": 5e-3,
}


@dataclass
class DenseArguments:
    """What to run, for how long."""

    output_dir: Path = field(default=Path("outputs/dense"), metadata={"help": "Where model and runs go."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "What is compared."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of the unlearning and of the groups."})
    epochs: int = field(default=30, metadata={"help": "In which the model learns the facts."})
    steps: int = field(default=200, metadata={"help": "Of the unlearning."})
    minutes: float = field(default=60.0, metadata={"help": "No run begins after this."})


def main() -> None:
    """Run what is not there yet, and print the table."""
    (args,) = HfArgumentParser(DenseArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    runs = Runs(args.output_dir, minutes=args.minutes)
    ground = Ground(args)
    for key in runs.missing({"method": method, "seed": seed} for seed, method in product(args.seeds, args.methods)):
        runs.keep(key | ground.run(**key))
    print(table(runs))


class Ground:
    """The model, what is unlearned, what is kept and what is asked."""

    def __init__(self, args: DenseArguments) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
        self.forget = load_facts([FORGET_TOPIC])
        halves = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC]).train_test_split(
            test_size=0.5, seed=0
        )
        self.retain = halves["train"]
        self.asked = {
            "forget": self.forget.shuffle(seed=0).select(range(120)),
            "retain": halves["test"].select(range(120)),
        }

    def load(self) -> LlamaForCausalLM:
        """The dense model, which learns the facts where it has not yet."""
        folder = self.args.output_dir / "base"
        if not (folder / "config.json").exists():
            learn(load_facts(), self.tokenizer, epochs=self.args.epochs).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """One method's line."""
        set_seed(seed)
        model: Any = self.load()
        if method == "base":
            return {"targets": [], "trained": 0, "seconds": 0.0, **self.scores(model)}
        config = self.adapter(method, model, seed)
        started = time.process_time()
        trained = self.unlearn(model, config, rate=METHODS[method], seed=seed)
        seconds = time.process_time() - started
        count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        targets: list[Any] = []
        if isinstance(trained, PeftModel):
            targets = list(getattr(trained.active_peft_config, "target_experts", ()))
            trained = trained.merge_and_unload()
        dense = to_dense(trained) if targets else trained
        return {"targets": targets, "trained": count, "seconds": round(seconds, 1), **self.scores(dense.eval())}

    def adapter(self, method: str, model: Any, seed: int) -> UOEConfig | LoraConfig | None:
        """What is trained; None: all parameters. Puts the neurons into groups where it is a group."""
        match method:
            case "all parameters":
                return None
            case "LoRA":
                return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        partition, score, *rest = method.split(", ")
        factorize(model, self.groups(model, clustered=partition == "clustered", seed=seed))
        found = attribute_experts(
            model,
            self.forget,
            processing_class=self.tokenizer,
            score=score,  # type: ignore[arg-type]
            retain_dataset=self.retain,
            num_candidates=4 * NUM_GROUPS,
            batch_size=50,
            seed=seed,
            show_progress=False,
        )
        best = found.top(1)[0]
        print(method, "chose", best, "lift", None if score == "random" else found.lift(best), flush=True)
        targets = found.top(1, strategy="each_layer") if rest else [best]
        return UOEConfig(target_experts=targets, train_router=False)

    def groups(self, model: Any, *, clustered: bool, seed: int) -> NeuronGroups:
        """The neurons in groups: by what they do on the facts, or by lot."""
        if not clustered:
            return NeuronGroups.random(num_neurons(model), NUM_GROUPS, seed=seed)
        text = concatenate_datasets([self.forget, self.retain]).select_columns(["prompt", "completion"])
        return cluster_neurons(
            model,
            text,
            processing_class=self.tokenizer,
            num_groups=NUM_GROUPS,
            batch_size=50,
            seed=seed,
            show_progress=False,
        )

    def unlearn(self, model: Any, config: UOEConfig | LoraConfig | None, *, rate: float, seed: int) -> Any:
        """The trained model."""
        arguments = UnlearningConfig(
            str(self.args.output_dir / "trainer"),
            forget_loss="npo",
            beta=0.05,
            alternative_weight=1.0,
            retain_weight=8.0,
            learning_rate=rate,
            lr_scheduler_type="linear",
            max_steps=self.args.steps,
            per_device_train_batch_size=8,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=self.args.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        trainer = UnlearningTrainer(
            model=model,
            args=arguments,
            train_dataset=self.forget,
            retain_dataset=self.retain,
            processing_class=self.tokenizer,
            peft_config=config,
        )
        trainer.train()
        return trainer.model

    def scores(self, model: Any) -> dict[str, float]:
        """Mean ROUGE-L recall of each set."""
        found = {}
        for name, rows in self.asked.items():
            prompts = [self.tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
            answers = greedy_answers(
                model, prompts, tokenizer=self.tokenizer, max_new_tokens=48, batch_size=120, desc=name
            )
            truths = [completion.strip() for completion in rows["completion"]]
            found[name] = round(fmean(rouge_l_recall(answers, truths)), 4)
        return found


def learn(facts: Dataset, tokenizer: Any, *, epochs: int) -> LlamaForCausalLM:
    """A dense model trained on facts from scratch, each asked in one of its phrasings."""
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).train()
    rng, peak, size = random.Random(0), 2e-3, 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    total = epochs * math.ceil(len(facts) / size)
    step = 0
    for epoch in range(epochs):
        rows = [
            {"prompt": as_prompt(rng.choice(phrasings)), "completion": completion}
            for phrasings, completion in zip(facts["phrasings"], facts["completion"], strict=True)
        ]
        examples = list(tokenize_dataset(Dataset.from_list(rows), tokenizer, max_length=None, name="facts"))
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), size):
            batch = collate([examples[i] for i in order[start : start + size]], pad_token_id=tokenizer.pad_token_id)
            rate = min(1, (step + 1) / 50) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / total)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)
    return model


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown."""
    lines = [
        "| what is trained | layer:group (first seed) | parameters | forget | retain | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        targets = " ".join(f"{layer}:{group}" for layer, group in own[0]["targets"])
        forget, retain, seconds = (fmean(run[key] for run in own) for key in ("forget", "retain", "seconds"))
        lines.append(f"| {method} | {targets} | {own[0]['trained']:,} | {forget:.2f} | {retain:.2f} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
