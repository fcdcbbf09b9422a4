"""What attribution costs: throughput against the bare decoder, and memory against the number of tokens.

    python benchmarks/attribution.py --output outputs/attribution.json
    python benchmarks/attribution.py --scale small --rounds 1 --memory_tokens 2048       # to see that it runs

Three ways of reading the same batch take turns in one process, batch after batch, so that a machine that gets slower in
between slows all of them: the bare decoder (no LM head, no cache), attribution as it is (which ends at the last router
and so skips the last layer's experts), and attribution that is made to run the whole decoder (its overhead alone). The
ratio of throughputs is the median, over batches and rounds, of the ratio for one batch: by the clock, and by CPU
seconds, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from clock import seconds
from random_models import Setting, add_arguments, base_model, setting_of
from tqdm import tqdm
from transformers import PreTrainedModel

from uoe_peft.attribution import expert_use
from uoe_peft.attribution.expert_use import measure_expert_use
from uoe_peft.attribution.sampling import SampleBatches


def make_batches(setting: Setting, num_tokens: int) -> SampleBatches:
    """Random sequences of half to one and a half times the setting's length, the longest first."""
    generator = torch.Generator().manual_seed(0)
    examples: list[dict[str, list[int]]] = []
    while sum(len(example["input_ids"]) for example in examples) < num_tokens:
        length = int(torch.randint(setting.length // 2, 3 * setting.length // 2 + 1, (1,), generator=generator))
        ids = torch.randint(3, setting.vocab_size, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": ids})
    examples.sort(key=lambda example: -len(example["input_ids"]))
    return SampleBatches(examples, batch_size=setting.batch_size, pad_token_id=0)


@torch.no_grad()
def read_bare(model: PreTrainedModel, batches: SampleBatches) -> None:
    """Run the decoder over the batches and look at nothing."""
    for batch in batches:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        model.get_decoder()(**inputs, use_cache=False)


def attribute(model: PreTrainedModel, batches: SampleBatches) -> None:
    """The whole pass of attribution, with its bootstrap resamples."""
    measure_expert_use(model, batches)


def attribute_whole(model: PreTrainedModel, batches: SampleBatches) -> None:
    """The same, but every batch runs to the end of the decoder."""

    @contextmanager
    def whole_pass(model: PreTrainedModel, layer_idx: int) -> Any:
        yield lambda **inputs: model.get_decoder()(**inputs, use_cache=False)

    with patch.object(expert_use, "run_until_routed", whole_pass):
        measure_expert_use(model, batches)


ARMS: dict[str, Callable[[PreTrainedModel, SampleBatches], None]] = {
    "bare decoder": read_bare,
    "attribution": attribute,
    "attribution, whole decoder": attribute_whole,
}


def measure_throughput(
    model: PreTrainedModel, setting: Setting, *, num_tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of each arm, and its median ratios to the bare decoder."""
    batches, size = make_batches(setting, num_tokens), setting.batch_size
    singles = [
        SampleBatches(batches.examples[start : start + size], size, pad_token_id=0)
        for start in range(0, len(batches.examples), size)
    ]
    for arm in ARMS.values():
        arm(model, singles[-1])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}  # wall, CPU
    for number, single in enumerate(tqdm(singles * rounds, unit="batch")):
        names = list(ARMS) if number % 2 == 0 else list(reversed(ARMS))
        for name in names:
            cpu = time.process_time()
            wall = seconds(partial(ARMS[name], model, single), setting.device)
            times[name].append((wall, time.process_time() - cpu))
    wall_total = {name: sum(wall for wall, _ in pairs) for name, pairs in times.items()}
    return {
        name: {
            "tokens_per_second": rounds * batches.num_tokens / wall_total[name],
            "ratio": median_ratio(times["bare decoder"], pairs, column=0),
            "cpu_ratio": median_ratio(times["bare decoder"], pairs, column=1),
        }
        for name, pairs in times.items()
    }


def median_ratio(bare: list[tuple[float, float]], own: list[tuple[float, float]], *, column: int) -> float:
    """Median over measurements of how many times as fast as the bare decoder an arm was."""
    return statistics.median(b[column] / o[column] for b, o in zip(bare, own, strict=True))


def measure_memory(model: PreTrainedModel, setting: Setting, *, sizes: list[int]) -> dict[int, float]:
    """Peak memory above the model, in MB, after reading more and more tokens. A peak can only rise."""
    base = peak_memory(setting.device)
    peaks = {}
    for num_tokens in sizes:
        attribute(model, make_batches(setting, num_tokens))
        peaks[num_tokens] = peak_memory(setting.device) - base
    return peaks


def peak_memory(device: str) -> float:
    """Largest memory on the device so far, in MB; on the CPU, of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB


def main() -> None:
    """Measure, print a table, write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4_096, help="tokens a round")
    parser.add_argument("--memory_tokens", type=int, nargs="+", default=[2_048, 8_192, 32_768])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = setting_of(args)
    model = base_model(setting).eval()
    # Memory first: what the other arms would have allocated must not hide a growth.
    memory = measure_memory(model, setting, sizes=args.memory_tokens)
    throughput = measure_throughput(model, setting, num_tokens=args.tokens, rounds=args.rounds)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "setting": vars(setting),
        "threads": args.threads,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "throughput": throughput,
        "peak_memory_above_model_mb": memory,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.processor() or platform.machine(),
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{result['parameters'] / 1e6:.0f} M parameters, {args.threads} threads, {setting}")
    print("| | tokens/s | against the bare decoder, by the clock | by CPU seconds |\n|---|---|---|---|")
    for name, row in throughput.items():
        print(f"| {name} | {row['tokens_per_second']:,.0f} | {row['ratio']:.3f} | {row['cpu_ratio']:.3f} |")
    print("\n| tokens read | peak memory above the model, MB |\n|---|---|")
    for num_tokens, megabytes in memory.items():
        print(f"| {num_tokens:,} | {megabytes:.0f} |")


if __name__ == "__main__":
    main()
