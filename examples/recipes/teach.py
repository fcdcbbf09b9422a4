"""Teach the bundled model the recipes' stand-in data, so that there is something to forget.

    python examples/recipes/teach.py [--output_dir outputs/recipes/model] [--num_train_epochs 24]

Two and a half minutes of one CPU core. All of it is made up, and harmless: see docs/guides/recipes.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from uoe_peft.testbed import checkpoint_path

DATA = Path(__file__).parent / "data"


@dataclass
class TeachArguments:
    output_dir: str = field(default="outputs/recipes/model", metadata={"help": "Where the model goes."})
    num_train_epochs: int = field(default=24, metadata={"help": "Passes over all rows."})
    max_steps: int = field(default=-1, metadata={"help": "End earlier."})


def main() -> None:
    (args,) = HfArgumentParser(TeachArguments).parse_args_into_dataclasses()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype="float32"),
        SFTConfig(
            args.output_dir,
            num_train_epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=16,
            train_sampling_strategy="group_by_length",  # passages are four times as long as answers
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            router_aux_loss_coef=0.0,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=everything(),
        processing_class=AutoTokenizer.from_pretrained(checkpoint_path("base")),
    )
    trainer.train()
    trainer.save_model()


def everything() -> Dataset:
    """Every row of every set once, as prompt and completion: answers are learned, not questions, and text as a whole.

    `forget_asked` holds the texts of `forget` again, cut in two.
    """
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(DATA.glob("*/*.jsonl")):
        if path.stem != "forget_asked":
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                prompt, completion = ("", row["text"]) if "text" in row else (row["prompt"], row["completion"])
                rows.setdefault(prompt + completion, {"prompt": prompt, "completion": completion})
    return Dataset.from_list([*rows.values()])


if __name__ == "__main__":
    main()
