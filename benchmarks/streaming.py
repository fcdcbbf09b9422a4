"""The method on a checkpoint of Qwen1.5-MoE-A2.7B's true sizes, read layer by layer: memory and time of each stage.

Usage: `python -m benchmarks.streaming [--layers 24] [--tokens 10000] [--steps 50] [--folder FOLDER]` (from the
repository's root; 24 layers take 29 GB of disk, which are removed afterwards).

Weights are random: what they say means nothing, what they cost does. With fewer layers the line "per layer" says what
each of them adds. The bound is the larger of two times: reading the file once at the disk's speed, and the
multiplications of one forward pass at the speed of the machine's matrix products, both measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2MoeConfig

from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.export import merge_checkpoint
from uoe_peft.streaming import StreamedModel
from uoe_peft.testbed import checkpoint_path, load_facts
from uoe_peft.training import solve_unlearning

GIB = 2**30


def config(num_layers: int) -> Qwen2MoeConfig:
    """Qwen1.5-MoE-A2.7B, with fewer layers where asked."""
    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        dtype="bfloat16",
    )


def shapes(model: Qwen2MoeConfig) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Each shard's name and its tensors."""
    hidden, expert, shared = model.hidden_size, model.moe_intermediate_size, model.shared_expert_intermediate_size
    ends = {"model.embed_tokens.weight": (model.vocab_size, hidden), "lm_head.weight": (model.vocab_size, hidden)}
    yield "ends", {**ends, "model.norm.weight": (hidden,)}
    for layer_idx in range(model.num_hidden_layers):
        tensors: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        tensors |= {f"self_attn.{name}_proj.bias": (hidden,) for name in "qkv"}
        tensors |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        tensors |= {"mlp.gate.weight": (model.num_experts, hidden), "mlp.shared_expert_gate.weight": (1, hidden)}
        mlps = {"mlp.shared_expert": shared} | {f"mlp.experts.{idx}": expert for idx in range(model.num_experts)}
        for path, size in mlps.items():
            tensors |= {f"{path}.{name}_proj.weight": (size, hidden) for name in ("gate", "up")}
            tensors[f"{path}.down_proj.weight"] = (hidden, size)
        yield f"layer-{layer_idx}", {f"model.layers.{layer_idx}.{name}": shape for name, shape in tensors.items()}


def write(folder: Path, model: Qwen2MoeConfig) -> int:
    """Write the checkpoint; its size in bytes."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_path("base")).save_pretrained(folder)
    pool = (0.02 * torch.randn(2**23)).bfloat16()
    weight_map: dict[str, str] = {}
    for name, tensors in shapes(model):
        made = {key: _numbers(pool, shape, place) for place, (key, shape) in enumerate(tensors.items())}
        save_file(made, folder / f"{name}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _numbers(pool: torch.Tensor, shape: tuple[int, ...], place: int) -> torch.Tensor:
    """Different random numbers for each tensor of a shard, faster than drawn ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=pool.dtype)
    size, start = torch.Size(shape).numel(), place * 104_729 % (len(pool) // 2)
    copies = -(-size // (len(pool) // 2))
    return pool[start : start + len(pool) // 2].repeat(copies)[:size].clone().view(shape)


def uncached(folder: Path) -> None:
    """Have the system forget what it knows of the files, so that they are read from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_speed(folder: Path) -> float:
    """Bytes per second of reading a shard from the disk."""
    uncached(folder)
    path = max(folder.glob("*.safetensors"), key=lambda shard: shard.stat().st_size)
    buffer, start = bytearray(2**24), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return path.stat().st_size / (time.perf_counter() - start)


def matmul_speed() -> float:
    """Multiplications and additions per second in float32, at the height of an expert's share of a batch."""
    left, right = torch.randn(256, 2048), torch.randn(2048, 2816)
    left @ right
    start = time.perf_counter()
    for _ in range(20):
        left @ right
    return 20 * 2 * left.numel() * right.shape[1] / (time.perf_counter() - start)


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def measured(found: dict[str, Any], name: str, *, above: int) -> Iterator[None]:
    """Time and peak memory of what runs inside the context."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        ended.set()
        thread.join()
        found[name] = {"seconds": round(seconds, 1), "peak_gib": round((peak[0] - above) / GIB, 2)}
        print(name, found[name], flush=True)


def rows(tokenizer: Any, *, num_tokens: int, length: int) -> tuple[Dataset, Dataset]:
    """Forget and retain sets of plain text, each of about so many tokens."""
    texts = [f"{row['prompt']} {row['completion']}" for row in load_facts()]
    ids = [token for text in texts for token in tokenizer(text)["input_ids"]]
    ids = ids * (2 * num_tokens // len(ids) + 1)
    pieces = [ids[start : start + length] for start in range(0, 2 * num_tokens, length)]
    half = len(pieces) // 2
    as_text = [tokenizer.decode(piece) for piece in pieces]
    return Dataset.from_dict({"text": as_text[:half]}), Dataset.from_dict({"text": as_text[half:]})


def stages(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every stage once, each from files that the system has not cached."""
    found: dict[str, Any] = {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    forget, retain = rows(tokenizer, num_tokens=options.tokens, length=128)
    above = resident_bytes()
    reading: dict[str, Any] = {"max_tokens": options.tokens, "batch_size": 8, "max_length": 128}

    def run(name: str, stage: Callable[[], Any]) -> Any:
        uncached(folder)
        with measured(found, name, above=above):
            return stage()

    def opened() -> Any:
        return StreamedModel.from_pretrained(folder, dtype="float32", show_progress=options.progress)

    model = run("open", opened)
    attribution = run("attribute", partial(attribute_experts, model, forget, processing_class=tokenizer, **reading))
    del model
    target = attribution.top(1)
    if options.solve:
        solving: dict[str, Any] = {**reading, "processing_class": tokenizer, "target_experts": target}
        run("solve", lambda: solve_unlearning(opened(), forget, retain, **solving))
    args = UnlearningConfig(
        output_dir=str(folder / "adapter"),
        forget_loss="rmu",
        retain_loss="embed_diff",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        max_length=128,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not options.progress,
    )

    def train() -> None:
        trainer = UnlearningTrainer(
            model=opened(),
            args=args,
            train_dataset=forget.select(range(min(len(forget), 4 * options.steps))),
            retain_dataset=retain.select(range(min(len(retain), 4 * options.steps))),
            processing_class=tokenizer,
            peft_config=UOEConfig(target_experts=target),
        )
        trainer.train()
        trainer.save_model(args.output_dir)

    run("train and save", train)
    run("merge", lambda: merge_checkpoint(folder, args.output_dir, folder / "merged"))
    return {"target": target, **found}


def main() -> None:
    """Write, measure, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solve", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="uoe-streaming-", dir=options.folder))
    try:
        model = config(options.layers)
        size = write(folder, model)
        per_token = 2 * (4 * 2048**2 + 3 * 2048 * (5632 + 4 * 1408) + 61 * 2048) * options.layers
        disk, matmul = read_speed(folder), matmul_speed()
        bounds = {"read": size / disk, "multiply": options.tokens * per_token / matmul}
        print({"gigabytes": size / 1e9, "disk_gb_s": disk / 1e9, "matmul_gflops": matmul / 1e9, **bounds}, flush=True)
        found = stages(folder, options)
        taken = found["attribute"]["seconds"]
        print({"attribute_over_bound": taken / max(bounds.values()), "per_layer_s": taken / options.layers})
        print(json.dumps(found))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
