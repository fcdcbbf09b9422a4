"""How the cost of UOE's step, of LoRA's, changes with what the model and the batch are: a JSON file and a plot.

Four sweeps around one setting, each with the other sizes as they are: the layer of the expert, the number of experts,
the tokens of a batch, and the vocabulary (half of the tokens are answers, which the LM head reads). Steps and ratios
are those of `step_time.py`.

    python benchmarks/step_sweeps.py --output outputs/step_sweeps.json --plot outputs/step_time.png
    python benchmarks/step_sweeps.py --scale small --num_layers 4 --rounds 1       # to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from clock import median_ratio
from random_models import Setting, add_arguments, setting_of
from step_time import step_times
from training_steps import Method

METHODS: tuple[Method, ...] = ("uoe", "uoe, cached", "lora")
NUM_EXPERTS = (8, 32, 128)
NUM_TOKENS = (256, 1024, 4096)
VOCAB_SIZES = (8_192, 32_768, 151_936)

Sweeps = dict[str, dict[int, Setting]]
Ratios = dict[Setting, dict[str, float]]


def main() -> None:
    """Run the sweeps, print a table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sweeps = sweeps_around(setting_of(arguments))
    ratios: Ratios = {}
    print("| what | size | uoe, of LoRA's step | uoe, cached |\n|---|---|---|---|")
    for name, settings in sweeps.items():
        for size, setting in settings.items():
            if setting not in ratios:
                ratios[setting] = measure(setting, rounds=arguments.rounds)
            print("| {} | {:,} | {uoe:.3f} | {uoe, cached:.3f} |".format(name, size, **ratios[setting]), flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(_rows(sweeps, ratios, threads=arguments.threads), indent=2))
    if arguments.plot:
        draw(sweeps, ratios, arguments.plot)


def sweeps_around(setting: Setting) -> Sweeps:
    """Settings by the size that changes."""
    layers, length = setting.num_layers, setting.length
    return {
        "target layer": {
            layer_idx: replace(setting, target_layer=layer_idx)
            for layer_idx in (layers // 4, layers // 2, 3 * layers // 4, layers - 1)
        },
        "experts": {number: replace(setting, num_experts=number) for number in NUM_EXPERTS},
        "tokens a batch": {tokens: replace(setting, batch_size=tokens // length) for tokens in NUM_TOKENS},
        "vocabulary": {size: replace(setting, vocab_size=size) for size in VOCAB_SIZES},
    }


def measure(setting: Setting, *, rounds: int) -> dict[str, float]:
    """Median ratio of each method's step to LoRA's."""
    times, _ = step_times(setting, METHODS, rounds=rounds)
    gc.collect()  # models hold themselves through their hooks; the next one needs the room
    return {method: median_ratio(times[method], times["lora"]) for method in METHODS}


def _rows(sweeps: Sweeps, ratios: Ratios, *, threads: int) -> list[dict[str, object]]:
    return [
        {"sweep": name, "size": size, "threads": threads, "setting": asdict(setting), "of_lora": ratios[setting]}
        for name, settings in sweeps.items()
        for size, setting in settings.items()
    ]


def draw(sweeps: Sweeps, ratios: Ratios, path: Path) -> None:
    """One panel a sweep: the share of LoRA's step that UOE's takes, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(sweeps), 3), layout="constrained")
    for axes, (name, settings) in zip(figure.subplots(1, len(sweeps), sharey=True), sweeps.items(), strict=True):
        sizes = list(settings)
        for method in METHODS[:-1]:
            axes.plot(sizes, [ratios[settings[size]][method] for size in sizes], marker="o", label=method)
        axes.set(xlabel=name, yscale="log")
        if name != "target layer":
            axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="share of LoRA's step", ylim=(0.04, 1.2))
    figure.axes[0].set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["1/20", "1/10", "1/5", "1/2", "1"])
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
