"""What bfloat16 does to a delta: how much of it a merge rounds away, and whether forgetting survives the merge.

First table: an expert's slice of the testbed's base model in bfloat16, random deltas of falling size. "lost" is the
share of entries that a delta leaves as they were. UOE adds in float32 and rounds once; the other column adds and
subtracts in bfloat16 ten times over, as an in-place merge would, and counts the entries that do not come back.

Second table: one topic of the testbed is unlearned, and the model is asked with the adapter unmerged and merged.

    python benchmarks/precision.py --output outputs/precision.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft import (
    UnlearningConfig,
    UnlearningTrainer,
    UOEConfig,
    attribute_experts,
    evaluate_unlearning,
    find_moe_blocks,
)
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts


def main() -> None:
    """Run both parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="Optimiser steps of unlearning.")
    parser.add_argument("--max_examples", type=int, default=100, help="Facts of each set that are asked.")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rounding = [_rounding(size) for size in (1e-2, 1e-3, 1e-4, 1e-5)]
    print(
        "| size of the delta | lost in a bf16 merge | not restored by += and -= ten times | not restored by unmerge |"
    )
    print("|---|---|---|---|")
    for row in rounding:
        print("| {size:.0e} | {lost:.1%} | {in_place:.1%} | {unmerge:.1%} |".format(**row))
    forgetting = _forgetting(steps=arguments.steps, max_examples=arguments.max_examples)
    print("\n| adapter | forget ROUGE-L | forget probability | retain ROUGE-L | retain probability |")
    print("|---|---|---|---|---|")
    for name, scores in forgetting.items():
        cells = (f"{scores[s][m]:.3f}" for s in ("forget", "retain") for m in ("rouge_l_recall", "probability"))
        print(f"| {name} | {' | '.join(cells)} |")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({"rounding": rounding, "forgetting": forgetting}, indent=2))


def _base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint_path("base"), dtype=torch.bfloat16)


def _rounding(size: float) -> dict[str, float]:
    storage = find_moe_blocks(_base())[0].storage
    before = storage.weight("gate_up_proj", 0).detach().clone()
    delta = torch.randn(before.shape, generator=torch.Generator().manual_seed(0)) * size
    merged = (before.float() + delta).bfloat16()
    in_place = before.clone()
    for _ in range(10):
        in_place += delta
        in_place -= delta
    return {
        "size": size,
        "lost": _share(merged == before),
        "in_place": _share(in_place != before),
        "unmerge": _not_restored(delta),
    }


def _not_restored(delta: Tensor) -> float:
    """Share of the slice's entries that ten merges and unmerges of a UOE adapter change."""
    model = get_peft_model(_base(), UOEConfig(target_experts=[(0, 0)]))
    storage = find_moe_blocks(model)[0].storage
    before = storage.weight("gate_up_proj", 0).clone()
    for name, parameter in model.named_parameters():
        if name.endswith("uoe_delta.default.gate_up_proj"):
            parameter.data[0] = delta
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    return _share(storage.weight("gate_up_proj", 0) != before)


def _share(mask: Tensor) -> float:
    return mask.float().mean().item()


def _forgetting(*, steps: int, max_examples: int) -> dict[str, dict[str, dict[str, float]]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
    forget, retain = load_facts([FORGET_TOPIC]), load_facts([t for t in TOPICS if t != FORGET_TOPIC])
    base = _base()
    attribution = attribute_experts(
        base, forget, processing_class=tokenizer, score="contrast", retain_dataset=retain, batch_size=50
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearningTrainer(
            model=base,
            args=UnlearningConfig(
                output_dir=folder,
                forget_loss="npo",
                retain_weight=4.0,
                learning_rate=5e-3,
                max_steps=steps,
                per_device_train_batch_size=8,
                report_to="none",
                save_strategy="no",
                bf16=False,
                log_routing=False,
            ),
            train_dataset=forget,
            retain_dataset=retain,
            processing_class=tokenizer,
            peft_config=UOEConfig(target_experts=attribution.top(1)),
        )
        trainer.train()
        trainer.save_model(folder)
        # A model that has been trained keeps the trainer's forward, also in copies: the merged one is loaded afresh.
        merged = PeftModel.from_pretrained(_base(), folder).merge_and_unload()
    model = trainer.model.eval()

    report = evaluate_unlearning(
        model,
        forget_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        retrained_model=merged,  # asked as a third model beside base and unlearned
        max_examples=max_examples,
        batch_size=50,
        max_new_tokens=48,
    ).to_dict()
    return {"off (base)": report["base"], "on, unmerged": report["unlearned"], "merged": report["retrained"]}


if __name__ == "__main__":
    main()
