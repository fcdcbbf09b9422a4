"""Memory and time of `merge_checkpoint` on a checkpoint that is large, made up, and removed afterwards.

Usage: `python -m benchmarks.merge_checkpoint [--gigabytes 8.5] [--folder FOLDER]` (from the repository's root; it needs
free disk space of twice the size of the checkpoint's largest shard beside the checkpoint itself).

Two layouts: matrices of single experts, where the largest touched tensor is one matrix; and fused stacks, where it is
all experts' of a layer. Each merge runs in a process of its own that has merged a tiny checkpoint first, so that
imports are not counted, and is compared with copying the touched shards and hashing the copies.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GraniteMoeConfig, PreTrainedConfig, Qwen3MoeConfig

from uoe_peft.checkpoints import INDEX
from uoe_peft.export import merge_checkpoint
from uoe_peft.tuner import UOEConfig

HIDDEN, EXPERT, EXPERTS, VOCAB = 2048, 1408, 64, 1000


def config(layout: str, *, layers: int, hidden: int, expert: int, experts: int) -> PreTrainedConfig:
    """A model of one of the two layouts."""
    shared = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCAB,
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
    }
    if layout == "per_expert":
        return Qwen3MoeConfig(
            **shared,
            architectures=["Qwen3MoeForCausalLM"],
            head_dim=hidden // 16,
            moe_intermediate_size=expert,
            num_experts=experts,
        )
    return GraniteMoeConfig(
        **shared, architectures=["GraniteMoeForCausalLM"], intermediate_size=expert, num_local_experts=experts
    )


def expert_tensors(layout: str, layer: int, *, hidden: int, expert: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's experts and router on disk."""
    if layout == "fused":
        block = f"model.layers.{layer}.block_sparse_moe"
        return {
            f"{block}.input_linear.weight": (experts, 2 * expert, hidden),
            f"{block}.output_linear.weight": (experts, hidden, expert),
            f"{block}.router.layer.weight": (experts, hidden),
        }
    block = f"model.layers.{layer}.mlp"
    shapes = {"gate_proj": (expert, hidden), "up_proj": (expert, hidden), "down_proj": (hidden, expert)}
    names = {f"{block}.experts.{e}.{name}.weight": shape for e in range(experts) for name, shape in shapes.items()}
    return {**names, f"{block}.gate.weight": (experts, hidden)}


def write_checkpoint(folder: Path, layout: str, *, layers: int, hidden: int, expert: int, experts: int) -> None:
    """Experts and routers in one shard a layer; other tensors do not matter to a merge."""
    folder.mkdir(parents=True)
    config(layout, layers=layers, hidden=hidden, expert=expert, experts=experts).save_pretrained(folder)
    noise = torch.randn(1 << 22).to(torch.bfloat16)
    weight_map = {}
    for layer in range(layers):
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {}
        for name, shape in expert_tensors(layout, layer, hidden=hidden, expert=expert, experts=experts).items():
            size = torch.Size(shape).numel()
            tensors[name] = noise.repeat(-(-size // len(noise)))[:size].view(shape)
            weight_map[name] = shard
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_adapter(folder: Path, layout: str, *, layer: int, hidden: int, expert: int, experts: int) -> None:
    """A full delta of one expert and of its router."""
    block = f"base_model.model.model.layers.{layer}." + ("block_sparse_moe" if layout == "fused" else "mlp")
    router = "router" if layout == "fused" else "gate"
    folder.mkdir(parents=True)
    UOEConfig(target_experts=[(layer, 1)], base_experts={}).save_pretrained(str(folder))
    deltas = {
        f"{block}.experts.uoe_delta.gate_up_proj": torch.randn(1, 2 * expert, hidden) * 1e-2,
        f"{block}.experts.uoe_delta.down_proj": torch.randn(1, hidden, expert) * 1e-2,
        f"{block}.{router}.uoe_delta.weight": torch.randn(1, experts, hidden) * 1e-2,
    }
    save_file(deltas, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def resident(field: str) -> int:
    """Bytes of this process, `VmRSS` now or `VmHWM` at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure(folder: Path) -> dict[str, Any]:
    """One merge in this process, after a tiny one."""
    merge_checkpoint(folder / "tiny", folder / "tiny_adapter", folder / "tiny_out")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = resident("VmRSS"), time.perf_counter()
    edit = merge_checkpoint(folder / "base", folder / "adapter", folder / "out", backup=folder / "backup")
    seconds = time.perf_counter() - start
    assert edit.shards is not None
    return {
        "seconds": seconds,
        "peak": resident("VmHWM") - before,
        "rewritten": sorted(edit.shards.rewritten),
        "linked": len(edit.shards.linked),
        "changed": sum(tensor.num_bytes for tensor in edit.tensors),
    }


def copy_and_hash(folder: Path, shards: list[str]) -> float:
    """Seconds to copy the touched shards, hash what is written and hash what is read back: what no merge can save."""
    start = time.perf_counter()
    for shard in shards:
        digest = hashlib.sha256()
        with (folder / "base" / shard).open("rb") as old, (folder / "copy").open("wb") as new:
            while block := old.read(1 << 20):
                digest.update(block)
                new.write(block)
        with (folder / "copy").open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == digest.hexdigest()
    return time.perf_counter() - start


def run(layout: str, folder: Path, gigabytes: float) -> str:
    """A line of the table."""
    sizes = {"hidden": HIDDEN, "expert": EXPERT, "experts": EXPERTS}
    layers = max(2, round(gigabytes * 1e9 / (2 * 3 * HIDDEN * EXPERT * EXPERTS) + 0.5))
    tiny = {"hidden": 64, "expert": 48, "experts": 4}
    write_checkpoint(folder / "tiny", layout, layers=2, **tiny)
    write_adapter(folder / "tiny_adapter", layout, layer=1, **tiny)
    write_checkpoint(folder / "base", layout, layers=layers, **sizes)
    write_adapter(folder / "adapter", layout, layer=layers // 2, **sizes)
    total = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    command = [sys.executable, "-m", "benchmarks.merge_checkpoint", "--measure", str(folder)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    copying = copy_and_hash(folder, result["rewritten"])
    largest = 2 * HIDDEN * EXPERT * (2 * EXPERTS if layout == "fused" else 1)
    rewritten = sum((folder / "base" / shard).stat().st_size for shard in result["rewritten"])
    return (
        f"| {layout} | {total / 1e9:.1f} GB, {layers} | {rewritten / 1e9:.2f} GB, {len(result['rewritten'])} | "
        f"{result['changed'] / 1e6:.1f} MB | {largest / 1e6:.1f} MB | {result['peak'] / 1e6:.1f} MB | "
        f"{result['seconds']:.1f} s | {copying:.1f} s |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.5)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure))))
        return
    print(
        "| layout | checkpoint, shards | rewritten, shards | changed | largest touched tensor | peak | merge | copy |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for layout in ("per_expert", "fused"):
        folder = Path(tempfile.mkdtemp(prefix="merge_checkpoint.", dir=options.folder))
        try:
            print(run(layout, folder, options.gigabytes), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
