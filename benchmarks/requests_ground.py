"""What `requests.py` works on: five requests, what is kept, what is asked, and how an adapter is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from tofu_model import ROWS_AN_AUTHOR
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import UnlearningConfig, UOEConfig, attribute_experts
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.moments import Moments, measure_moments
from uoe_peft.requests import RequestTrainer, retain_with_requests
from uoe_peft.testbed import TOPICS, checkpoint_path, load_facts
from uoe_peft.training.choices import RetainLoss

TOPICS_REQUESTED = ("potions", "towns", "library", "missions", "boardgame")

Row = dict[str, Any]


@dataclass
class Recipe:
    """How each request is trained."""

    steps: int = field(default=100, metadata={"help": "Of each request."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Of UOE adapters; every rate falls linearly."})
    full_learning_rate: float = field(default=5e-4, metadata={"help": "Of all parameters."})
    lora_learning_rate: float = field(default=2e-3, metadata={"help": "Of LoRA."})
    ssu_learning_rate: float = field(default=5e-4, metadata={"help": "Of SSU."})
    retain_loss: RetainLoss = field(default="embed_diff", metadata={"help": "What keeps the rest as it is."})
    retain_weight: float = field(default=3.0, metadata={"help": "Of the retain loss."})
    earlier_weight: float = field(default=24.0, metadata={"help": "Of earlier requests' facts, which nll keeps."})
    forget_limit: float = field(default=0.05, metadata={"help": "Forget probability that strength must reach."})


class Ground:
    """A model's facts, split into requests and what is kept, and what is asked of each.

    Args:
        output_dir: Where adapters go.
        recipe: How requests are trained.
        folder: What `grounds.py` wrote, whose authors to be forgotten are a request each; None: the testbed.

    Attributes:
        output_dir: As given.
        recipe: As given.
        requests: Forget sets by name, in their order.
        names: Their names.
        retain: Rows of all else that training reads.
        chosen_on: Rows of them on which rates are chosen, and which nothing else reads.
        asked: Rows that are asked in the end.
    """

    def __init__(self, output_dir: Path, recipe: Recipe, folder: Path | None = None) -> None:
        self.output_dir, self.recipe = output_dir, recipe
        self._base = folder / "base" if folder else checkpoint_path("base")
        self.longest = 96 if folder else 48  # tokens of an answer
        self.tokenizer = AutoTokenizer.from_pretrained(self._base)
        self.requests, rest = authors(folder) if folder else topics()
        self.names = tuple(self.requests)
        halves = rest.train_test_split(test_size=0.5, seed=0)
        self.retain = halves["train"]
        self.chosen_on = halves["test"].select(range(120, 200))
        mixed = {name: rows.shuffle(seed=0) for name, rows in self.requests.items()}
        asked = {name: rows.select(range(min(40, len(rows) // 2))) for name, rows in mixed.items()}
        self.asked = {**asked, "retain": halves["test"].select(range(120))}

    def load(self) -> Any:
        """The base model, in float32."""
        return AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).eval()

    def load_with(self, folder: Path, names: Sequence[str]) -> Any:
        """The base model with the adapters of these requests, all active and frozen; the base where there are none."""
        model: Any = self.load()
        for place, name in enumerate(names):
            if place:
                model.load_adapter(folder / name, name)
            else:
                model = PeftModel.from_pretrained(model, folder / name, adapter_name=name)
        if names:
            model.base_model.set_adapter(list(names))
            model.requires_grad_(False)
        return model.eval()

    def recall(self, model: Any, rows: Dataset) -> float:
        """Mean ROUGE-L recall of greedy answers."""
        prompts = [self.tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
        options: dict[str, Any] = {"max_new_tokens": self.longest, "batch_size": 120, "desc": "answers"}
        return rouge(greedy_answers(model.eval(), prompts, tokenizer=self.tokenizer, **options), rows)

    def scores(self, model: Any) -> dict[str, float]:
        """The recall of each request and of the retain set, on what is asked of it."""
        return {name: self.recall(model, rows) for name, rows in self.asked.items()}

    def report(self, step: str, model: Any, **more: Any) -> Row:
        """All scores of a model, as a row."""
        configs = getattr(model, "peft_config", {})
        experts = {name: config.target_experts for name, config in configs.items() if isinstance(config, UOEConfig)}
        return {"step": step, **self.scores(model.eval()), "experts": experts, **more}

    def kept(self, *, after: int, earlier: Iterable[str] = ()) -> Dataset:
        """The retain set with all topics not yet requested; and earlier requests with their refusals."""
        later = [self.requests[topic] for topic in self.names[after + 1 :]]
        rows = concatenate_datasets([self.retain, *later])
        return retain_with_requests(rows, [self.requests[topic] for topic in earlier], self.tokenizer)

    def kept_apart(self, topic: str) -> Dataset:
        """The retain set with all other topics."""
        return concatenate_datasets([self.retain, *(rows for name, rows in self.requests.items() if name != topic)])

    def config(self, model: Any, forget: Dataset, kept: Dataset) -> UOEConfig:
        """An adapter of the expert that `contrast` ranks first on the model as it is."""
        options: dict[str, Any] = {"score": "contrast", "retain_dataset": kept, "batch_size": 50}
        found = attribute_experts(model, forget, processing_class=self.tokenizer, show_progress=False, **options)
        return UOEConfig(target_experts=found.top(1))

    def train(
        self,
        model: Any,
        forget: Dataset,
        kept: Dataset,
        *,
        seed: int,
        trainer_class: type[RequestTrainer] = RequestTrainer,
        earlier: Mapping[str, Dataset] | None = None,
        earlier_moments: Mapping[str, Moments] | None = None,
        **options: Any,
    ) -> Row:
        """Train what is trainable, at the least strength that forgets enough; what was chosen, and the CPU time.

        Args:
            model: The model.
            forget: The request.
            kept: What the retain loss reads.
            seed: Of training.
            trainer_class: A trainer that adds to the loss.
            earlier: See `RequestTrainer`.
            earlier_moments: Likewise.
            **options: Of `UnlearningConfig`, in place of the recipe's.
        """
        started, recipe = process_time(), self.recipe
        settings: dict[str, Any] = {
            "forget_loss": "npo",
            "beta": 0.05,
            "alternative_weight": 1.0,
            "retain_loss": recipe.retain_loss,
            "retain_weight": recipe.retain_weight,
            "rmu_layer": model.config.num_hidden_layers - 1,  # the last: what answers are read from
            "calibrate": "forget",
            "calibrate_metric": "probability",
            "calibrate_forget_limit": recipe.forget_limit,
            "learning_rate": recipe.learning_rate,
            "lr_scheduler_type": "linear",
            "max_steps": recipe.steps,
        }
        trainer = trainer_class(
            model=model,
            args=UnlearningConfig(
                str(self.output_dir / "training"),
                **{**settings, **options},
                per_device_train_batch_size=8,
                use_cpu=True,
                dataloader_pin_memory=False,
                logging_steps=1000,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            earlier=earlier,
            earlier_weight=recipe.earlier_weight,
            earlier_moments=earlier_moments,
            train_dataset=forget,
            retain_dataset=kept,
            eval_dataset={"retain": self.chosen_on},
            processing_class=self.tokenizer,
        )
        trainer.train()
        choice = trainer.strength_choice
        strength = 1.0 if choice is None else choice.scale
        return {"strength": strength, "seconds": round(process_time() - started, 1)}

    def moments(self, experts: Sequence[tuple[int, int]]) -> dict[str, Moments]:
        """Moments of every request and of the retain set, in the base model."""
        found, model = {}, self.load()
        for name, rows in {**self.requests, "retain": self.retain}.items():
            examples = list(tokenize_dataset(rows, self.tokenizer, max_length=None))
            batches = (collate(examples[i : i + 50], pad_token_id=0) for i in range(0, len(examples), 50))
            found[name] = measure_moments(model, batches, experts, name=name, strict=False)
        return found


def rouge(answers: Iterable[str], rows: Dataset) -> float:
    """Mean ROUGE-L recall of answers."""
    truths = [completion.strip() for completion in rows["completion"]]
    return round(fmean(rouge_l_recall(list(answers), truths)), 4)


def topics() -> tuple[dict[str, Dataset], Dataset]:
    """Five of the testbed's seven topics, 200 facts each; and the other two."""
    rest = [topic for topic in TOPICS if topic not in TOPICS_REQUESTED]
    return {topic: load_facts([topic]) for topic in TOPICS_REQUESTED}, load_facts(rest)


def authors(folder: Path) -> tuple[dict[str, Dataset], Dataset]:
    """TOFU's authors to be forgotten, 20 rows each, in the order of their rows; and all other authors."""
    forget, rest = (Dataset.from_json(str(folder / f"{name}.jsonl")) for name in ("forget", "retain"))
    starts = range(0, len(forget), ROWS_AN_AUTHOR)
    found = {f"author {start // ROWS_AN_AUTHOR + 1}": range(start, start + ROWS_AN_AUTHOR) for start in starts}
    return {name: forget.select(rows) for name, rows in found.items()}, rest
