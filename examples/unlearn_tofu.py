"""Unlearn five percent of TOFU's authors: python examples/unlearn_tofu.py --model Qwen/Qwen1.5-MoE-A2.7B-Chat.

Without arguments it takes the bundled model and made-up authors in TOFU's columns, and needs no network.
"""

import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, evaluate_unlearning
from uoe_peft.testbed import checkpoint_path, load_facts

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--output_dir", default="outputs/examples/forget-authors")
options = parser.parse_args()


def as_chat(row):
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


if options.model:
    forget = load_dataset("locuslab/TOFU", "forget05", split="train").map(as_chat)
    retain = load_dataset("locuslab/TOFU", "retain95", split="train").map(as_chat)
    small = {}
else:
    forget, retain = load_facts(["authors"]).select(range(64)), load_facts(["library", "towns"])
    small = {"learning_rate": 5e-3, "max_steps": 8, "use_cpu": True, "dataloader_pin_memory": False}

name = options.model or str(checkpoint_path("base"))
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if options.model else "float32", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(name)
trainer = UnlearningTrainer(
    model=model,
    args=UnlearningConfig(options.output_dir, forgets="five percent of TOFU's authors", report_to="none", **small),
    train_dataset=forget,
    retain_dataset=retain,
    processing_class=tokenizer,
    peft_config=UOEConfig(target_experts="auto"),
)
trainer.train()
trainer.save_model()
report = evaluate_unlearning(
    trainer.model.eval(),
    forget_dataset=forget,
    retain_dataset=retain,
    processing_class=tokenizer,
    max_examples=8,
    max_new_tokens=48,
)
print(report.summary())
