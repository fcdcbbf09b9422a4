"""What `requests.py` works on: five requests, what is kept, what is asked, and how an adapter is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import UnlearningConfig, UOEConfig, attribute_experts
from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.evaluation.generation import greedy_answers
from uoe_peft.evaluation.metrics import rouge_l_recall
from uoe_peft.moments import Moments, measure_moments
from uoe_peft.requests import WithdrawableTrainer, retain_with_requests
from uoe_peft.testbed import TOPICS, checkpoint_path, load_facts

REQUESTS = ("potions", "towns", "library", "missions", "boardgame")
WITHDRAWN = REQUESTS[1]


@dataclass
class Recipe:
    """How each request is trained."""

    steps: int = field(default=200, metadata={"help": "Of each request."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Of adapters; it falls linearly."})
    later_learning_rate: float | None = field(default=None, metadata={"help": "From the second request on."})
    retain_weight: float = field(default=8.0, metadata={"help": "Of the retain loss."})
    retain_share: float | None = field(default=0.99, metadata={"help": "That strength must keep; None: strength 1."})
    retain_projection: float | None = field(default=None, metadata={"help": "rho of the retain projection."})


class Ground:
    """The testbed, split into requests and what is kept, and what is asked of each.

    Attributes:
        output_dir: Where training may write.
        requests: Forget sets.
        retain: Rows of the other two topics that training reads.
        chosen_on: Rows of them on which strengths and rates are chosen, and nothing else is.
        asked: Rows that are asked in the end.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
        self.requests = {topic: load_facts([topic]) for topic in REQUESTS}
        rest = load_facts([topic for topic in TOPICS if topic not in REQUESTS])
        halves = rest.train_test_split(test_size=0.5, seed=0)
        self.retain = halves["train"]
        self.chosen_on = halves["test"].select(range(120, 200))
        asked = {topic: rows.shuffle(seed=0).select(range(40)) for topic, rows in self.requests.items()}
        self.asked = {**asked, "retain": halves["test"].select(range(120))}

    def answers(self, model: Any, rows: Dataset) -> list[str]:
        """Greedy answers."""
        prompts = [self.tokenizer(prompt)["input_ids"] for prompt in rows["prompt"]]
        options: dict[str, Any] = {"max_new_tokens": 48, "batch_size": 120, "desc": ""}
        return list(greedy_answers(model, prompts, tokenizer=self.tokenizer, **options))

    def scores(self, model: Any) -> dict[str, float]:
        """Mean ROUGE-L recall of each request and of the retain set."""
        return {name: rouge(self.answers(model, rows), rows) for name, rows in self.asked.items()}

    def kept(self, *, after: int, earlier: Iterable[str] = ()) -> Dataset:
        """The retain set with all topics not yet requested; and earlier requests with their refusals."""
        later = [self.requests[topic] for topic in REQUESTS[after + 1 :]]
        rows = concatenate_datasets([self.retain, *later])
        return retain_with_requests(rows, [self.requests[topic] for topic in earlier], self.tokenizer)

    def expert(self, model: Any, forget: Dataset, kept: Dataset) -> list[tuple[int, int]]:
        """The expert that `contrast` ranks first on the model as it is."""
        options: dict[str, Any] = {"score": "contrast", "retain_dataset": kept, "batch_size": 50}
        found = attribute_experts(model, forget, processing_class=self.tokenizer, show_progress=False, **options)
        return found.top(1)

    def config(self, model: Any, forget: Dataset, kept: Dataset) -> UOEConfig:
        """An adapter of that expert."""
        return UOEConfig(target_experts=self.expert(model, forget, kept))

    def train(
        self,
        model: Any,
        forget: Dataset,
        kept: Dataset,
        recipe: Recipe,
        *,
        seed: int,
        rate: float | None = None,
        steps: int | None = None,
        earlier: Mapping[str, Dataset] | None = None,
        trainer_class: type[WithdrawableTrainer] = WithdrawableTrainer,
        **options: Any,
    ) -> WithdrawableTrainer:
        """Train what is trainable; a strength is chosen for adapters where the recipe names a share."""
        choosing = recipe.retain_share is not None and options.pop("choose", True)
        settings: dict[str, Any] = {
            "forget_loss": "npo",
            "beta": 0.05,
            "alternative_weight": 1.0,
            "retain_weight": recipe.retain_weight,
            "retain_projection": recipe.retain_projection,
            "calibrate": "retain" if choosing else False,
            "calibrate_metric": "probability",
            "calibrate_retain_share": recipe.retain_share or 1.0,
            "learning_rate": rate or recipe.learning_rate,
            "lr_scheduler_type": "linear",
            "max_steps": steps or recipe.steps,
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
            earlier=earlier or {},
            train_dataset=forget,
            retain_dataset=kept,
            eval_dataset={"retain": self.chosen_on},
            processing_class=self.tokenizer,
        )
        trainer.train()
        return trainer

    def moments(self, model: Any, experts: list[tuple[int, int]]) -> dict[str, Moments]:
        """Moments of every request and of the retain set, in the base model."""
        found = {}
        with model.disable_adapter():
            for name, rows in {**self.requests, "retain": self.retain}.items():
                examples = list(tokenize_dataset(rows, self.tokenizer, max_length=None))
                batches = (collate(examples[i : i + 50], pad_token_id=0) for i in range(0, len(examples), 50))
                found[name] = measure_moments(model, batches, experts, name=name, strict=False)
        return found

    def report(self, step: str, model: Any, **more: Any) -> dict[str, Any]:
        """All scores of a model, as a row that is printed."""
        configs = getattr(model, "peft_config", {})
        experts = {name: getattr(config, "target_experts", None) for name, config in configs.items()}
        row = {"step": step, **self.scores(model.eval()), "experts": experts, **more}
        print(row, flush=True)
        return row


def rouge(answers: list[str], rows: Dataset) -> float:
    """Mean ROUGE-L recall."""
    return round(fmean(rouge_l_recall(answers, [completion.strip() for completion in rows["completion"]])), 4)


def load() -> Any:
    """The testbed's base model, in float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype=torch.float32).eval()
