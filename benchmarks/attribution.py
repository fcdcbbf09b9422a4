"""What attribution costs: throughput against the bare decoder, and memory against the number of tokens.

    python benchmarks/attribution.py results.json

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
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from uoe_peft.attribution import expert_use
from uoe_peft.attribution.expert_use import measure_expert_use
from uoe_peft.attribution.sampling import SampleBatches

BATCH_SIZE = 8


def build_model() -> PreTrainedModel:
    """A Qwen2MoE with random weights, 140 million parameters."""
    config = Qwen2MoeConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        moe_intermediate_size=704,
        shared_expert_intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    return Qwen2MoeForCausalLM(config).eval()


def make_batches(num_tokens: int) -> SampleBatches:
    """Random sequences of 64 to 192 tokens, the longest first."""
    generator = torch.Generator().manual_seed(0)
    examples: list[dict[str, list[int]]] = []
    while sum(len(example["input_ids"]) for example in examples) < num_tokens:
        length = int(torch.randint(64, 193, (1,), generator=generator))
        ids = torch.randint(4096, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": ids})
    examples.sort(key=lambda example: -len(example["input_ids"]))
    return SampleBatches(examples, batch_size=BATCH_SIZE, pad_token_id=0)


@torch.no_grad()
def read_bare(model: PreTrainedModel, batches: SampleBatches) -> None:
    """Run the decoder over the batches and look at nothing."""
    for batch in batches:
        model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


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


def measure_throughput(model: PreTrainedModel, *, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of each arm, and its median ratios to the bare decoder."""
    batches = make_batches(num_tokens)
    singles = [
        SampleBatches(batches.examples[start : start + BATCH_SIZE], BATCH_SIZE, pad_token_id=0)
        for start in range(0, len(batches.examples), BATCH_SIZE)
    ]
    for arm in ARMS.values():
        arm(model, singles[-1])
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}  # wall, CPU
    for number, single in enumerate(tqdm(singles * rounds, unit="batch")):
        names = list(ARMS) if number % 2 == 0 else list(reversed(ARMS))
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            ARMS[name](model, single)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    wall_total = {name: sum(wall for wall, _ in pairs) for name, pairs in seconds.items()}
    return {
        name: {
            "tokens_per_second": rounds * batches.num_tokens / wall_total[name],
            "ratio": median_ratio(seconds["bare decoder"], pairs, column=0),
            "cpu_ratio": median_ratio(seconds["bare decoder"], pairs, column=1),
        }
        for name, pairs in seconds.items()
    }


def median_ratio(bare: list[tuple[float, float]], own: list[tuple[float, float]], *, column: int) -> float:
    """Median over measurements of how many times as fast as the bare decoder an arm was."""
    return statistics.median(b[column] / o[column] for b, o in zip(bare, own, strict=True))


def measure_memory(model: PreTrainedModel, *, sizes: list[int]) -> dict[int, float]:
    """Peak resident memory above the model, in MB, after reading more and more tokens. A peak can only rise."""
    base = peak_memory()
    peaks = {}
    for num_tokens in sizes:
        attribute(model, make_batches(num_tokens))
        peaks[num_tokens] = peak_memory() - base
    return peaks


def peak_memory() -> float:
    """Largest resident memory of this process so far, in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    """Measure, print a table, write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4_096, help="tokens a round")
    parser.add_argument("--memory_tokens", type=int, nargs="+", default=[2_048, 8_192, 32_768])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model()
    # Memory first: what the other arms would have allocated must not hide a growth.
    memory = measure_memory(model, sizes=args.memory_tokens)
    throughput = measure_throughput(model, num_tokens=args.tokens, rounds=args.rounds)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": args.threads,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "throughput": throughput,
        "peak_memory_above_model_mb": memory,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.processor() or platform.machine(),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{result['parameters'] / 1e6:.0f} M parameters, {args.threads} threads")
    print("| | tokens/s | against the bare decoder, by the clock | by CPU seconds |\n|---|---|---|---|")
    for name, row in throughput.items():
        print(f"| {name} | {row['tokens_per_second']:,.0f} | {row['ratio']:.3f} | {row['cpu_ratio']:.3f} |")
    print("\n| tokens read | peak memory above the model, MB |\n|---|---|")
    for num_tokens, megabytes in memory.items():
        print(f"| {num_tokens:,} | {megabytes:.0f} |")


if __name__ == "__main__":
    main()
