"""How long it takes to switch an expert's forgetting on and off: merge and unmerge of one expert.

The expert has the size of Qwen1.5-MoE's (3 x 2048 x 1408, bfloat16) with a full delta in float32. The number of experts
varies, to show that the time does not depend on the model's size.

    python benchmarks/toggle.py --output outputs/toggle.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from clock import seconds
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from uoe_peft.tuner import UOEConfig

HIDDEN_SIZE, INTERMEDIATE_SIZE = 2048, 1408


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_experts", type=int, nargs="+", default=[8, 60])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [_measure(n, repeats=arguments.repeats, device=arguments.device) for n in arguments.num_experts]
    print("| experts | delta | merge, ms | unmerge, ms | copy of the expert, ms |\n|---|---|---|---|---|")
    for row in (row for pair in rows for row in pair):
        print("| {num_experts} | {delta_type} | {merge_ms:.1f} | {unmerge_ms:.1f} | {copy_ms:.1f} |".format(**row))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(rows, indent=2))


def _measure(num_experts: int, *, repeats: int, device: str) -> list[dict[str, object]]:
    kinds = ("full", "low_rank")
    return [_measure_delta(num_experts, kind, repeats=repeats, device=device) for kind in kinds]


def _measure_delta(num_experts: int, delta_type: str, *, repeats: int, device: str) -> dict[str, object]:
    model = _model(num_experts, delta_type, device=device)
    stack = model.get_base_model().model.layers[0].mlp.experts.get_base_layer().gate_up_proj
    source = torch.randn(3 * HIDDEN_SIZE * INTERMEDIATE_SIZE, device=device).to(stack.dtype)
    target = torch.empty_like(source)
    times: dict[str, list[float]] = {"merge": [], "unmerge": [], "copy": []}
    for _ in range(repeats):
        times["merge"].append(seconds(model.merge_adapter, device))
        times["unmerge"].append(seconds(model.unmerge_adapter, device))
        times["copy"].append(seconds(lambda: target.copy_(source), device))
    medians = {f"{name}_ms": 1000 * statistics.median(values) for name, values in times.items()}
    return {"num_experts": num_experts, "delta_type": delta_type, "device": device, **medians}


def _model(num_experts: int, delta_type: str, *, device: str) -> PeftModel:
    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=128,
        moe_intermediate_size=INTERMEDIATE_SIZE,
        shared_expert_intermediate_size=128,
        num_experts=num_experts,
        num_experts_per_tok=4,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = get_peft_model(base, UOEConfig(target_experts=[(0, num_experts // 2)], delta_type=delta_type))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


if __name__ == "__main__":
    main()
