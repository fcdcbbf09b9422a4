"""What a training step costs: UOE with and without its prefix cache, LoRA on experts, ESFT-like and full training.

One model with random weights, the same tokens for all, steps of all methods in turn in one process; what they are says
`training_steps.py`. Ratios are medians over rounds, so that a slow moment of the machine hits all methods alike: to
"lora", and of RMU's rows to "rmu, lora". Peak memory is measured in a process of its own for each method: what the
step needs above the model.

    python benchmarks/step_time.py --output outputs/step_time.json
    python benchmarks/step_time.py --scale small --rounds 2       # a few seconds, to see that it runs
    python benchmarks/step_time.py --vocab_size 151936 --methods uoe "uoe, cached" lora
    python benchmarks/step_time.py --device cuda --scale qwen3-30b-a3b
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from clock import interleaved, median_ratio
from random_models import Setting, add_arguments, base_model, setting_of
from training_steps import Method, is_rmu, training_step, with_adapter

Times = dict[Method, list[float]]

_NOT_MEASURED = dict.fromkeys(("of_lora", "trainable_m", "peak_mb"), float("nan"))


def main() -> None:
    """Run the benchmark and print a table."""
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    setting = setting_of(arguments)
    if arguments.memory_of:
        print(json.dumps(_peak_memory(arguments.memory_of, setting)))
        return
    methods = arguments.methods or default_methods(setting)
    times, total = step_times(setting, methods, rounds=arguments.rounds)
    rows = [_row(method, times) | ({} if arguments.no_memory else _memory_in_process(method)) for method in times]
    print(f"{total / 1e6:.0f} M parameters, {setting}\n")
    print("| method | s a step | of LoRA's | trainable, M | peak above the model, MB |\n|---|---|---|---|---|")
    for row in rows:
        cells = _NOT_MEASURED | row
        print("| {method} | {seconds:.3f} | {of_lora:.3f} | {trainable_m:.2f} | {peak_mb:.0f} |".format(**cells))
    of_limit = median_ratio(times["uoe, cached"], times["limit"]) if {"uoe, cached", "limit"} <= set(times) else None
    if of_limit is not None:
        print(f"\nuoe, cached: {of_limit:.3f} of the limit")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"parameters": total, "setting": vars(setting), "threads": arguments.threads, "methods": rows}
        arguments.output.write_text(json.dumps(result | {"cached_of_limit": of_limit, "times": times}, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=get_args(Method), help="None: all that fit.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_memory", action="store_true", help="Do not measure memory.")
    parser.add_argument("--memory_of", choices=get_args(Method), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    return parser


def default_methods(setting: Setting) -> list[Method]:
    """All methods; at the scale of published models no full training, which needs a second copy and AdamW's state."""
    methods: tuple[Method, ...] = get_args(Method)
    return [method for method in methods if method != "full" or setting.scale in ("small", "default")]


# ---- Time ----


def step_times(setting: Setting, methods: Sequence[Method], *, rounds: int) -> tuple[Times, int]:
    """Seconds of each method's steps, by round, and the number of the model's parameters.

    A method for which the device has no room beside the others is left out, and said.
    """
    base, steps = base_model(setting), {}
    with ExitStack() as stack:
        for method in methods:
            try:
                step = training_step(method, with_adapter(method, base, setting), setting, stack)
                step()
            except torch.OutOfMemoryError:
                print(f"{method}: out of memory, left out", file=sys.stderr)
                continue
            steps[method] = step
        times = interleaved(steps, rounds=rounds, device=setting.device)
    return times, sum(parameter.numel() for parameter in base.parameters())


def _row(method: Method, times: Times) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "seconds": statistics.median(times[method])}
    other = times.get("rmu, lora" if is_rmu(method) else "lora")
    return row if other is None else row | {"of_lora": median_ratio(times[method], other)}


# ---- Memory ----


def _memory_in_process(method: Method) -> dict[str, float]:
    flags = [f"-W{option}" for option in sys.warnoptions]
    command = [sys.executable, *flags, *sys.argv, "--memory_of", method]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _peak_memory(method: Method, setting: Setting) -> dict[str, float]:
    """Peak of two steps above what the model takes before the first, in MB, and trainable parameters, in millions."""
    base = base_model(setting)
    # One model is enough here: what is measured is what comes on top of it.
    model = base.requires_grad_(True) if method == "full" else with_adapter(method, base, setting)
    with ExitStack() as stack:
        step = training_step(method, model, setting, stack)
        peak = _cuda_peak(step) if setting.device.startswith("cuda") else _resident_peak(step)
    trainable = 0 if method == "limit" else sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"peak_mb": peak / 1e6, "trainable_m": trainable / 1e6}


def _resident_peak(step: Callable[[], None]) -> float:
    # Memory that the set-up freed must not count as the model's, or it hides what the step takes.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
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
