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
from functools import partial
from pathlib import Path

import torch
from clock import interleaved, median_ratio
from peft import get_peft_model
from random_models import Setting, add_arguments, base_model, busiest_expert, random_batch, setting_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from uoe_peft.moe.segments import find_layers
from uoe_peft.tuner import UOEConfig


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(batch_size=1, length=1024)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = setting_of(arguments)
    base, ids = base_model(setting).eval(), random_batch(setting)["input_ids"]
    calls = {name: partial(_forward, model, ids) for name, model in _models(base, ids, setting).items()}
    times = interleaved(calls, rounds=arguments.rounds, device=setting.device)
    total = sum(p.numel() for p in base.parameters())
    print(f"{total / 1e6:.0f} M parameters, {setting}\n")
    print("| model | ms a forward pass | of the base model |\n|---|---|---|")
    rows = [_row(name, times) for name in times]
    for row in rows:
        print("| {model} | {ms:.1f} | {of_base:.3f} |".format(**row))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"parameters": total, "setting": vars(setting), "threads": arguments.threads, "models": rows}
        arguments.output.write_text(json.dumps(result | {"times": times}, indent=2))


def _models(base: PreTrainedModel, ids: Tensor, setting: Setting) -> dict[str, nn.Module]:
    target = (setting.target_layer, busiest_expert(base, ids, setting.target_layer))
    layer = find_layers(base).get_submodule(str(setting.target_layer))
    models: dict[str, nn.Module] = {"base": base, "base again": base}
    for name, delta_type in (("fresh", "full"), ("fresh, low rank", "low_rank"), ("merged", "full")):
        # A merged adapter writes into its layer's weights: only these are copied.
        copied = set(layer.parameters()) if name == "merged" else set()
        shared = {id(p): p for p in base.parameters() if p not in copied}
        config = UOEConfig(target_experts=[target], delta_type=delta_type)
        models[name] = get_peft_model(copy.deepcopy(base, memo=shared), config).eval()
    models["merged"].merge_adapter()
    return models


@torch.no_grad()
def _forward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)


def _row(name: str, times: dict[str, list[float]]) -> dict[str, object]:
    of_base = median_ratio(times[name], times["base"])
    return {"model": name, "ms": 1000 * statistics.median(times[name]), "of_base": of_base}


if __name__ == "__main__":
    main()
