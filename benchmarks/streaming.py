"""The method on a checkpoint of a published model's true sizes, read layer by layer: memory and time of each stage.

Usage: `python -m benchmarks.streaming [--model qwen1.5-moe] [--layers 24] [--tokens 10000] [--steps 50]
[--dtype float32] [--folder FOLDER]` (from the repository's root; 24 layers of Qwen1.5-MoE-A2.7B take 29 GB of disk,
which are removed afterwards).

Weights are random: what they say means nothing, what they cost does. With fewer layers the line "per layer" says what
each of them adds. The bound is the larger of two times: reading the file once at the disk's speed, and the
multiplications of one forward pass at the speed of the machine's matrix products, both measured here. On a machine that
others use, too, compare processor times: `cpu_s` of a stage with that of the multiplications.
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
from typing import Any, cast

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, Qwen2MoeConfig
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from benchmarks.published import published
from uoe_peft import UnlearningConfig, UnlearningTrainer, UOEConfig, attribute_experts
from uoe_peft.checkpoints import INDEX
from uoe_peft.export import merge_checkpoint
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.segments import find_layers
from uoe_peft.streaming import StreamedModel
from uoe_peft.streaming.memory import experts_per_token
from uoe_peft.streaming.quantisation import without_quantisation
from uoe_peft.testbed import checkpoint_path, load_facts
from uoe_peft.training import solve_unlearning

GIB = 2**30


# Of FP8 checkpoints, as DeepSeek-V3 is published: blocks of a matrix that share a scale.
BLOCK = 128
SHARD_BYTES = 2 * GIB


def config(model: str, num_layers: int) -> PreTrainedConfig:
    """A published model with fewer layers, of which no more than the first has no experts."""
    sizes: dict[str, tuple[str, PreTrainedConfig]] = {
        "qwen1.5-moe": (
            "Qwen2MoeForCausalLM",
            Qwen2MoeConfig(
                vocab_size=151_936,
                hidden_size=2048,
                intermediate_size=5632,
                moe_intermediate_size=1408,
                shared_expert_intermediate_size=5632,
                num_attention_heads=16,
                num_key_value_heads=16,
                num_experts=60,
                num_experts_per_tok=4,
                norm_topk_prob=False,
            ),
        ),
        "qwen3-235b": ("Qwen3MoeForCausalLM", published()["Qwen3-235B-A22B"]),
        "deepseek-v3": ("DeepseekV3ForCausalLM", published()["DeepSeek-V3"]),
    }
    name, published_config = sizes[model]
    found: Any = published_config
    found.architectures = [name]
    found.num_hidden_layers, found.layer_types, found.dtype = num_layers, None, "bfloat16"
    if hasattr(found, "first_k_dense_replace"):
        found.first_k_dense_replace = 1
    return cast(PreTrainedConfig, type(found)(**found.to_dict()))


def without_data(model: PreTrainedConfig) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(without_quantisation(model))


def shapes(model: PreTrainedConfig) -> dict[str, torch.Size]:
    """The tensors of a plain checkpoint, named as on disk."""
    made = without_data(model)
    return {name: tensor.shape for name, tensor in revert_weight_conversion(made, made.state_dict()).items()}


def active_parameters(model: PreTrainedConfig) -> tuple[float, float]:
    """What attribution multiplies a token with, in routed experts and elsewhere: the last layer up to its router."""
    made = without_data(model)
    blocks = {block.layer_idx: block for block in find_moe_blocks(made)}
    routed = others = 0.0
    for index, layer in enumerate(find_layers(made).children()):
        sizes = {name: parameter.numel() for name, parameter in layer.named_parameters()}
        block = blocks.get(index)
        experts = 0 if block is None else sum(p.numel() for p in block.experts.parameters())
        others += sum(sizes.values()) - experts
        if block is not None and index < max(blocks):
            routed += experts * experts_per_token(model, block.num_experts) / block.num_experts
        elif block is not None:  # the pass ends before shared experts
            others -= sum(size for name, size in sizes.items() if "shared" in name)
    return routed, others


def write(folder: Path, model: PreTrainedConfig) -> None:
    """Write the checkpoint; its index comes last."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_path("base")).save_pretrained(folder)
    is_fp8 = getattr(model, "quantization_config", None) is not None
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors(shapes(model), is_fp8=is_fp8):
        shard[name] = tensor
        if sum(held.nbytes for held in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors(found: dict[str, torch.Size], *, is_fp8: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Random weights, layer by layer; where the checkpoint is in eight bits, matrices of layers are, with scales."""
    pool = torch.randn(2**23)
    narrow, eight_bits = (0.02 * pool).bfloat16(), pool.to(torch.float8_e4m3fn)
    for place, name in enumerate(sorted(found, key=dot_natural_key)):
        shape = found[name]
        if is_fp8 and "_proj" in name and len(shape) == 2:
            yield name, _numbers(eight_bits, shape, place)
            grid = tuple(-(-size // BLOCK) for size in shape)
            yield f"{name}_scale_inv", 0.02 * (0.5 + torch.rand(grid))
        else:
            yield name, _numbers(narrow, shape, place)


def _numbers(pool: torch.Tensor, shape: torch.Size, place: int) -> torch.Tensor:
    """Different random numbers for each tensor, faster than drawn ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    size, start = shape.numel(), place * 104_729 % (len(pool) // 2)
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


def multiplication_times(model: PreTrainedConfig, dtype: str, *, num_tokens: int, at_once: int) -> dict[str, float]:
    """Seconds that one pass of attribution multiplies, and those of the processor, at speeds that are measured now.

    Routed experts multiply the few tokens of a batch that each of them gets, everything else multiplies all of them.
    """
    text: Any = model
    block = find_moe_blocks(without_data(model))[0]
    an_experts = at_once * text.num_experts_per_tok // block.num_experts
    found = {"multiply_s": 0.0, "multiply_cpu_s": 0.0}
    for parameters, num_rows in zip(active_parameters(model), (an_experts, at_once), strict=True):
        left = torch.randn(num_rows, text.hidden_size, dtype=getattr(torch, dtype))
        # Several matrices, as in a layer: one alone would stay in the processor's cache.
        matrices = torch.randn(8, text.hidden_size, 2 * text.moe_intermediate_size, dtype=left.dtype)
        left @ matrices[0]
        start, cpu = time.perf_counter(), time.process_time()
        for index in range(32):
            left @ matrices[index % len(matrices)]
        share = 2 * parameters * num_tokens / (32 * 2 * left.numel() * matrices.shape[2])
        found["multiply_s"] += share * (time.perf_counter() - start)
        found["multiply_cpu_s"] += share * (time.process_time() - cpu)
    return found


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
    start, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        ended.set()
        thread.join()
        found[name] = {
            "seconds": round(seconds, 1),
            "cpu_s": round(cpu, 1),
            "peak_gib": round((peak[0] - above) / GIB, 2),
        }
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
    forget, retain = rows(tokenizer, num_tokens=max(options.tokens, options.solve_tokens), length=options.length)
    above = resident_bytes()
    reading = {
        "processing_class": tokenizer,
        "max_tokens": options.tokens,
        "batch_size": options.rows_at_once,
        "max_length": options.length,
    }

    def run(name: str, stage: Callable[[], Any]) -> Any:
        uncached(folder)
        with measured(found, name, above=above):
            return stage()

    def opened() -> Any:
        memory = {"layer_memory": options.layer_memory, "state_memory": options.state_memory}
        return StreamedModel.from_pretrained(folder, dtype=options.dtype, show_progress=options.progress, **memory)

    run("open", opened)
    layer_idx = options.layers // 2 if options.layer is None else options.layer
    target = [(layer_idx, 0)]
    if options.attribute:
        attribution = run("attribute", partial(attribute_experts, opened(), forget, **reading))
        target = [(layer_idx, int(attribution.affinity[attribution.layer_indices.index(layer_idx)].argmax()))]
    args = UnlearningConfig(
        output_dir=str(folder / "adapter"),
        forget_loss="rmu",
        retain_loss="embed_diff",
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-4,
        max_length=options.length,
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
            train_dataset=forget.select(range(min(len(forget), options.rows))),
            retain_dataset=retain.select(range(min(len(retain), options.rows))),
            processing_class=tokenizer,
            peft_config=UOEConfig(target_experts=target),
        )
        trainer.train()
        trainer.save_model(args.output_dir)

    if options.train:
        run("train and save", train)
        run("merge", lambda: merge_checkpoint(folder, args.output_dir, folder / "merged"))
    if options.solve:
        solving = {**reading, "max_tokens": options.solve_tokens}
        run("solve", lambda: solve_unlearning(opened(), forget, retain, target_experts=target, **solving))
    return {"target": target, **found}


def main() -> None:
    """Write, measure, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["qwen1.5-moe", "qwen3-235b", "deepseek-v3"], default="qwen1.5-moe")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=10_000, help="that are attributed")
    parser.add_argument("--rows_at_once", type=int, default=8, help="of a batch that is attributed or solved from")
    parser.add_argument("--layer", type=int, help="that is edited (the middle one)")
    parser.add_argument("--attribute", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--solve", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--solve_tokens", type=int, default=10_000, help="of each set")
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rows", type=int, default=200, help="of each set that training reads")
    parser.add_argument("--length", type=int, default=128, help="of a row, in tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="that is computed in")
    parser.add_argument("--layer_memory", type=int, help="bytes; layers that take more come in without their experts")
    parser.add_argument("--state_memory", type=int, default=2 * GIB, help="bytes of hidden states")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in the folder, for the next run")
    options = parser.parse_args()
    if options.solve and not options.attribute:
        parser.error("--solve needs attribution, which finds an expert that tokens reach; leave out --no-attribute")
    folder = options.folder / f"uoe-streaming-{options.model}-{options.layers}"
    try:
        model = config(options.model, options.layers)
        if not (folder / INDEX).exists():
            with measured({}, "write", above=resident_bytes()):
                write(folder, model)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        at_once = options.rows_at_once * options.length
        disk = read_speed(folder)
        bounds = multiplication_times(model, options.dtype, num_tokens=options.tokens, at_once=at_once)
        bounds["read_s"] = size / disk
        print({"gigabytes": size / 1e9, "disk_gb_s": disk / 1e9, **bounds}, flush=True)
        found = stages(folder, options)
        if options.attribute:
            taken = found["attribute"]
            over = taken["seconds"] / max(bounds["read_s"], bounds["multiply_s"])
            print({"over_bound": over, "over_bound_cpu": taken["cpu_s"] / bounds["multiply_cpu_s"]})
            print({name: taken[name] / options.layers for name in ("seconds", "cpu_s")}, "per layer")
        print(json.dumps(found))
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
