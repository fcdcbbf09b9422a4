"""CPU seconds of a training step on a ground that `grounds.py` wrote, by what is trained.

    python benchmarks/ground_steps.py --ground outputs/smollm [--steps 16]

NPO + 8 nll, 8 forget and 8 retain rows a step, one thread; means over the steps after the first six, when the prefix
cache has been filled. UOE trains the expert that `contrast` chooses, with its router.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import disable_progress_bars
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback
from transformers.utils import logging as transformers_logging

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.cli.loading import load_rows

WARM_UP = 6  # steps


@dataclass
class StepsArguments:
    """Which ground, how many steps."""

    ground: Path = field(metadata={"help": "Folder that grounds.py wrote."})
    steps: int = field(default=16, metadata={"help": f"Of each training; more than {WARM_UP + 1}."})


class Clock(TrainerCallback):
    """When each step began, in seconds of this process."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.began.append(time.process_time())

    def mean(self) -> float:
        """Seconds of a step once all is warm."""
        own = self.began[WARM_UP:]
        return fmean(after - before for before, after in pairwise(own))


def main() -> None:
    """Train a little of each, and print the table."""
    (args,) = HfArgumentParser(StepsArguments).parse_args_into_dataclasses()
    if args.steps < WARM_UP + 2:
        raise ValueError(f"--steps {args.steps} leaves nothing to measure; use {WARM_UP + 2} or more")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.ground / "base")
    sets = {role: load_rows(str(args.ground / f"{role}.jsonl")) for role in ("forget", "retain")}
    found = attribute_experts(
        load(args.ground),
        sets["forget"],
        processing_class=tokenizer,
        score="contrast",
        retain_dataset=sets["retain"],
        show_progress=False,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    uoe = UOEConfig(target_experts=found.top(1))
    parts: dict[str, tuple[PeftConfig | None, bool]] = {
        f"UOE {found.top(1)}, prefix cache": (uoe, True),
        f"UOE {found.top(1)}": (uoe, False),
        "LoRA": (lora, False),
        "all parameters": (None, False),
    }
    print("| trained | CPU seconds a step |\n|---|---|")
    for name, (config, cached) in parts.items():
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            UnlearningTrainer(
                model=load(args.ground),
                args=training_arguments(folder, steps=args.steps, cached=cached),
                train_dataset=sets["forget"],
                retain_dataset=sets["retain"],
                processing_class=tokenizer,
                peft_config=config,
                callbacks=[clock],
            ).train()
        print(f"| {name} | {clock.mean():.2f} |", flush=True)


def load(ground: Path) -> Any:
    """The base model, in float32."""
    return AutoModelForCausalLM.from_pretrained(ground / "base", dtype=torch.float32).eval()


def training_arguments(folder: str, *, steps: int, cached: bool) -> UnlearningConfig:
    """A learning rate so low that all losses stay what they are."""
    return UnlearningConfig(
        folder,
        learning_rate=1e-6,
        max_steps=steps,
        forget_loss="npo",
        beta=0.05,
        retain_loss="nll",
        retain_weight=8.0,
        calibrate=False,
        log_routing=False,
        prefix_cache=cached,
        per_device_train_batch_size=8,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
