"""What a training step costs: UOE with and without its prefix cache, LoRA on experts, and full fine-tuning.

One Qwen2MoE with random weights, the same tokens for all, steps of all methods in turn in one process. A step is a
forward pass, cross-entropy of the answer tokens (the second half of each row), backward, AdamW. Ratios are medians over
rounds, so that a slow moment of the machine hits all methods alike. Peak memory is measured in a process of its own for
each method: what the step needs above the model.

"limit" is what a cached step cannot fall below: forward and backward of the frozen layers from the target on.

    python benchmarks/step_time.py --output outputs/step_time.json
    python benchmarks/step_time.py --scale small --rounds 2       # a few seconds, to see that it runs
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig

from uoe_peft.losses import nll_loss
from uoe_peft.moe.segments import find_layers, run_from_layer, run_until_layer
from uoe_peft.training.forward import forward_answers
from uoe_peft.training.prefix_cache import PrefixSource, prefix_cache
from uoe_peft.tuner import UOEConfig

Method = Literal[
    "uoe", "uoe, low rank", "uoe, cached", "uoe, low rank, cached", "lora, one layer", "lora", "full", "limit"
]
Scale = Literal["small", "default"]

SIZES: dict[Scale, dict[str, int]] = {
    "small": {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 8, "vocab_size": 512},
    "default": {"hidden_size": 512, "moe_intermediate_size": 384, "num_experts": 32, "vocab_size": 8192},
}
RANK = 16


@dataclass(frozen=True)
class Setting:
    """What is run."""

    scale: Scale
    num_layers: int
    batch_size: int
    length: int
    dtype: str
    device: str

    @property
    def target_layer(self) -> int:
        """At three quarters of the depth."""
        return 3 * self.num_layers // 4


def main() -> None:
    """Run the benchmark and print a table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    names = ("scale", "num_layers", "batch_size", "length", "dtype", "device")
    setting = Setting(**{name: getattr(arguments, name) for name in names})
    if arguments.memory_of:
        print(json.dumps(_peak_memory(arguments.memory_of, setting)))
        return
    times = _times(setting, arguments.methods, rounds=arguments.rounds)
    rows = [_row(method, times, None if arguments.no_memory else _memory_in_process(method)) for method in times]
    base = _base_model(setting)
    total = sum(p.numel() for p in base.parameters())
    print(f"{total / 1e6:.0f} M parameters, target layer {setting.target_layer} of {setting.num_layers}, {setting}\n")
    print("| method | s a step | of lora | trainable, M | peak above the model, MB |\n|---|---|---|---|---|")
    for row in rows:
        print("| {method} | {seconds:.3f} | {of_lora:.3f} | {trainable_m:.2f} | {peak_mb:.0f} |".format(**row))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"parameters": total, "setting": vars(setting), "threads": arguments.threads, "methods": rows}
        arguments.output.write_text(json.dumps(result | {"times": times}, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=get_args(Method), default=list(get_args(Method)))
    parser.add_argument("--scale", choices=get_args(Scale), default="default")
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_memory", action="store_true", help="Do not measure memory.")
    parser.add_argument("--memory_of", choices=get_args(Method), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    return parser


# ---- Models and steps ----


def _base_model(setting: Setting) -> PreTrainedModel:
    sizes = SIZES[setting.scale]
    config = Qwen2MoeConfig(
        **sizes,
        num_hidden_layers=setting.num_layers,
        num_experts_per_tok=4,
        shared_expert_intermediate_size=sizes["moe_intermediate_size"],
        intermediate_size=sizes["moe_intermediate_size"],
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        experts_implementation="grouped_mm",
    )
    torch.manual_seed(0)
    with torch.device(setting.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype)).train()


def _batch(setting: Setting) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch_size, setting.length)
    ids = torch.randint(3, SIZES[setting.scale]["vocab_size"], shape, generator=generator)
    labels = ids.clone()
    labels[:, : setting.length // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


def _with_adapter(method: Method, base: PreTrainedModel, setting: Setting) -> nn.Module:
    """The model that a method trains; frozen weights are shared with `base`."""
    if method == "full":
        return copy.deepcopy(base).requires_grad_(True)
    model = copy.deepcopy(base, memo={id(parameter): parameter for parameter in base.parameters()})
    projections = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    target = setting.target_layer
    match method:
        case "uoe" | "uoe, cached":
            return get_peft_model(model, UOEConfig(target_experts=[(target, _busiest(base, setting))]))
        case "uoe, low rank" | "uoe, low rank, cached":
            pair = (target, _busiest(base, setting))
            return get_peft_model(model, UOEConfig(target_experts=[pair], delta_type="low_rank", r=RANK))
        case "lora, one layer":
            names = [f"layers.{target}.{projection}" for projection in projections]
        case "lora":
            names = list(projections)
        case _:
            return model.requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=[], target_parameters=names, lora_dropout=0.0))


def _busiest(base: PreTrainedModel, setting: Setting) -> int:
    """The target layer's expert with the most tokens: attribution picks busy experts, and a busy one costs most."""
    router, chosen = find_layers(base).get_submodule(f"{setting.target_layer}.mlp.gate"), []
    handle = router.register_forward_hook(lambda module, args, output: chosen.append(output[-1]))
    with torch.no_grad():
        base(input_ids=_batch(setting)["input_ids"])
    handle.remove()
    return int(chosen[0].flatten().bincount().argmax())


def _step(method: Method, model: nn.Module, setting: Setting) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step, and what ends the method."""
    batch = _batch(setting)
    if method == "limit":
        return _limit_step(model, setting, batch), lambda: None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nll_loss(forward_answers(model, batch).log_probs).backward()
        optimizer.step()

    if not method.endswith("cached"):
        return step, lambda: None
    source = PrefixSource(model, setting.batch_size, 0, place=_to(setting.device), context=torch.no_grad)
    cached = prefix_cache(source, batch["input_ids"].tolist())
    cache = cached.__enter__()

    def cached_step() -> None:
        with cache.serve(model):
            step()

    return cached_step, lambda: cached.__exit__(None, None, None)


def _limit_step(model: nn.Module, setting: Setting, batch: dict[str, Tensor]) -> Callable[[], None]:
    layers = find_layers(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        state: Any = run_until_layer(model, setting.target_layer, inputs)

    def step() -> None:
        entering = state.detach().requires_grad_(True)
        with run_from_layer(layers, setting.target_layer, entering):
            nll_loss(forward_answers(model, batch).log_probs).backward()

    return step


def _to(device: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda batch: {name: tensor.to(device) for name, tensor in batch.items()}


# ---- Measuring ----


def _times(setting: Setting, methods: list[Method], *, rounds: int) -> dict[Method, list[float]]:
    base = _base_model(setting)
    steps: dict[Method, Callable[[], None]] = {}
    ends = []
    for method in methods:
        steps[method], end = _step(method, _with_adapter(method, base, setting), setting)
        ends.append(end)
        steps[method]()  # not timed: first calls allocate
    times: dict[Method, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, step in steps.items():
            times[method].append(_seconds(step, setting.device))
    for end in ends:
        end()
    return times


def _seconds(step: Callable[[], None], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _row(method: Method, times: dict[Method, list[float]], memory: dict[str, float] | None) -> dict[str, Any]:
    lora = times.get("lora", times[method])
    ratios = [own / other for own, other in zip(times[method], lora, strict=True)]
    measured = memory or {"peak_mb": float("nan"), "trainable_m": float("nan")}
    of_lora = statistics.median(ratios)
    return {"method": method, "seconds": statistics.median(times[method]), "of_lora": of_lora, **measured}


def _memory_in_process(method: Method) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--memory_of", method]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _peak_memory(method: Method, setting: Setting) -> dict[str, float]:
    """Peak of two steps above what the model takes before the first, in MB, and trainable parameters, in millions."""
    base = _base_model(setting)
    # One model is enough here: what is measured is what comes on top of it.
    model = base.requires_grad_(True) if method == "full" else _with_adapter(method, base, setting)
    step, end = _step(method, model, setting)
    peak = _cuda_peak(step) if setting.device.startswith("cuda") else _resident_peak(step)
    end()
    trainable = 0 if method == "limit" else sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"peak_mb": peak / 1e6, "trainable_m": trainable / 1e6}


def _resident_peak(step: Callable[[], None]) -> float:
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: resets the peak of resident memory
    step()
    step()
    lines = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return peak_kib * 1024 - before


def _cuda_peak(step: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    step()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    main()
