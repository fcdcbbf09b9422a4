"""What an adapter costs at inference: the forward pass with a fresh and with a merged adapter, against the base model.

One Qwen2MoE with random weights, the same tokens for all, forward passes in turn in one process; ratios are medians
over rounds. The edited expert is the one that the most tokens reach. "base again" shows what the ratios' noise is.

    python benchmarks/inference.py --output outputs/inference.json
    python benchmarks/inference.py --scale small --rounds 3       # a few seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig

from uoe_peft.moe.routing import record_routing
from uoe_peft.tuner import UOEConfig

Scale = Literal["small", "default"]

SIZES: dict[Scale, dict[str, int]] = {
    "small": {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 8, "vocab_size": 512},
    "default": {"hidden_size": 512, "moe_intermediate_size": 384, "num_experts": 32, "vocab_size": 8192},
}


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=get_args(Scale), default="default")
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = _base_model(arguments).eval()
    ids = torch.randint(3, base.config.vocab_size, (1, arguments.tokens)).to(arguments.device)
    models = _models(base, ids, layer_idx=3 * arguments.num_layers // 4)
    times = _times(models, ids, rounds=arguments.rounds, device=arguments.device)
    total = sum(p.numel() for p in base.parameters())
    print(f"{total / 1e6:.0f} M parameters, {arguments.tokens} tokens, {arguments.dtype}, {arguments.device}\n")
    print("| model | ms a forward pass | of the base model |\n|---|---|---|")
    rows = [_row(name, times) for name in times]
    for row in rows:
        print("| {model} | {ms:.1f} | {of_base:.3f} |".format(**row))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"parameters": total, "tokens": arguments.tokens, "models": rows, "times": times}
        arguments.output.write_text(json.dumps(result, indent=2))


def _base_model(arguments: argparse.Namespace) -> PreTrainedModel:
    sizes = SIZES[arguments.scale]
    config = Qwen2MoeConfig(
        **sizes,
        num_hidden_layers=arguments.num_layers,
        num_experts_per_tok=4,
        shared_expert_intermediate_size=sizes["moe_intermediate_size"],
        intermediate_size=sizes["moe_intermediate_size"],
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=max(2048, arguments.tokens),
        tie_word_embeddings=True,
        experts_implementation="grouped_mm",
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))


@torch.no_grad()
def _models(base: PreTrainedModel, ids: Tensor, *, layer_idx: int) -> dict[str, nn.Module]:
    with record_routing(base, layer_indices=[layer_idx]) as trace:
        base(input_ids=ids, use_cache=False)
        expert_idx = int(trace[layer_idx].top_k_index.flatten().bincount().argmax())
    models: dict[str, nn.Module] = {"base": base, "base again": base}
    for name, delta_type in (("fresh", "full"), ("fresh, low rank", "low_rank"), ("merged", "full")):
        # A merged adapter writes into the weights: only there they are copied.
        shared = {} if name == "merged" else {id(p): p for p in base.parameters()}
        config = UOEConfig(target_experts=[(layer_idx, expert_idx)], delta_type=delta_type)
        models[name] = get_peft_model(copy.deepcopy(base, memo=shared), config).eval()
    models["merged"].merge_adapter()
    return models


@torch.no_grad()
def _times(models: dict[str, nn.Module], ids: Tensor, *, rounds: int, device: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_idx in range(rounds + 1):
        for name, model in models.items():
            seconds = _seconds(lambda model=model: model(input_ids=ids, use_cache=False), device)
            if round_idx:  # the first round allocates
                times[name].append(seconds)
    return times


def _seconds(call: Callable[[], object], device: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _row(name: str, times: dict[str, list[float]]) -> dict[str, object]:
    ratios = [own / base for own, base in zip(times[name], times["base"], strict=True)]
    return {"model": name, "ms": 1000 * statistics.median(times[name]), "of_base": statistics.median(ratios)}


if __name__ == "__main__":
    main()
