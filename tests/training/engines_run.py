"""Trains, saves, loads, merges and generates on every engine that splits weights: run twice by `test_engines.py`.

Usage, with the variables of torchrun set: engines_run.py FOLDER, which has the base model in `base`.

Two processes on CPUs pretend to be two accelerators: for CPUs accelerate would put DDP in the place of FSDP without a
word, and refuses meshes. Collectives are gloo's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import TARGET, KeepGradients, make_args, make_sets, make_tokenizer, with_uoe
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.storage import one_of_stack
from uoe_peft.training import UnlearningTrainer
from uoe_peft.tuner import UOEConfig

IDS = torch.tensor([[5, 6, 7, 8, 9], [31, 32, 33, 34, 2]])
SHARDED = {
    "tp": {"tp_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "fsdp_ep": {"fsdp_size": 2, "ep_size": 2},
}
WHOLE_LAYERS = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2MoeDecoderLayer"]}
INSIDE_LAYERS = {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen2MoeDecoderLayer", "Qwen2MoeExperts"]}


def pretend_accelerators() -> None:
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def load(folder: Path, **options: Any) -> PreTrainedModel:
    config = DistributedConfig(**options) if options else None
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, distributed_config=config)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refusal(act: Any, error: type[Exception] = UnsupportedModelError) -> str:
    try:
        act()
    except error as refused:
        return str(refused)
    return "no error"


@contextmanager
def fetched() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what is brought together from all processes."""
    shapes, full_tensor = [], DTensor.full_tensor
    DTensor.full_tensor = lambda self: (shapes.append(tuple(self.shape)), full_tensor(self))[1]
    try:
        yield shapes
    finally:
        DTensor.full_tensor = full_tensor


@contextmanager
def starved(model: torch.nn.Module) -> Iterator[None]:
    """In the second process no token reaches the edited expert."""

    def elsewhere(experts, args):
        hidden, index, weights = args
        return hidden, torch.where(index == TARGET[1], (index + 1) % 6, index), weights

    handles = []
    if dist.get_rank() == 1:
        experts = next(block.experts for block in find_moe_blocks(model) if block.layer_idx == TARGET[0])
        handles = [experts.register_forward_pre_hook(elsewhere)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def make_trainer(model: Any, output: Path, *, batch_size: int, **options: Any) -> UnlearningTrainer:
    forget, retain = make_sets()
    return UnlearningTrainer(
        model,
        make_args(output_dir=str(output), per_device_train_batch_size=batch_size, log_routing=True, **options),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=make_tokenizer(),
        callbacks=[KeepGradients()],
    )


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return whole(model(input_ids=IDS).logits).clone()


def train(model: PeftModel, output: Path, **options: Any) -> tuple[UnlearningTrainer, dict[str, Any]]:
    trainer = make_trainer(model, output, **options)
    trainer.train()
    keep = next(c for c in trainer.callback_handler.callbacks if isinstance(c, KeepGradients))
    trainer.save_model(str(output / "saved"))
    model, wrapped = trainer.model.eval(), trainer.model_wrapped
    seen = {
        "gradients": {name: whole(gradient) for name, gradient in keep.gradients.items()},
        "state": {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad},
        "logs": trainer.state.log_history[:2],
        "sharded": any(isinstance(p, DTensor) for p in model.parameters()),
        "logits": logits(wrapped),
        "generated": model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False),
        "merging": refusal(model.merge_adapter, RuntimeError),
        "logits_afterwards": logits(wrapped),
    }
    with model.disable_adapter():
        seen["base_logits"] = logits(wrapped)
    return trainer, seen


def on_sharded_model(name: str, folder: Path) -> dict[str, Any]:
    output = folder / name
    same_batch = name.startswith("tp")
    with fetched() as shapes:
        model = with_uoe(load(folder, **SHARDED[name]))
    _, seen = train(model, output, batch_size=4 if same_batch else 2)
    seen["fetched"] = shapes
    # All processes come along, also where one has no use for the edited expert, with gradients and without.
    with starved(model):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        logits(model)
    base = model.unload()
    seen["loaded_logits"] = logits(PeftModel.from_pretrained(base, str(output / "saved")).eval())
    return seen


def on_ddp(folder: Path) -> dict[str, Any]:
    trainer, seen = train(with_uoe(load(folder)), folder / "ddp", batch_size=2)
    seen["wrapped"] = type(trainer.model_wrapped).__name__
    return seen


def on_fsdp_2(folder: Path) -> dict[str, Any]:
    model = with_uoe(load(folder))
    fsdp: dict[str, Any] = {"batch_size": 2, "fsdp": True, "fsdp_config": WHOLE_LAYERS}
    trainer, seen = train(model, folder / "fsdp_2", save_strategy="steps", save_steps=1, **fsdp)
    trainer.model.save_pretrained(str(folder / "by_hand"), is_main_process=dist.get_rank() == 0)
    dist.barrier()
    resumed = make_trainer(with_uoe(load(folder)), folder / "resumed", **fsdp)
    resumed.train(resume_from_checkpoint=str(folder / "fsdp_2" / "checkpoint-1"))
    trained = {name: p for name, p in resumed.model.named_parameters() if p.requires_grad}
    seen["resumed"] = {name: whole(p.detach()).clone() for name, p in trained.items()}
    return seen


def refusals(folder: Path) -> dict[str, str]:
    def inside_layers() -> None:
        trainer = make_trainer(
            with_uoe(load(folder)), folder / "inside", batch_size=2, fsdp=True, fsdp_config=INSIDE_LAYERS
        )
        trainer.train()

    return {
        "pp": refusal(lambda: with_uoe(load(folder, pp_size=2))),
        "fsdp_mixed_precision": refusal(lambda: with_uoe(load(folder, fsdp_size=2, fsdp_mixed_precision=True))),
        "inside_layers": refusal(inside_layers),
    }


def found_experts(folder: Path) -> tuple[list[tuple[int, int]], list[str]]:
    """What attribution finds, and what trains beside the adapter after passes with it and without it."""
    forget, retain = make_sets()
    trainer = UnlearningTrainer(
        load(folder, fsdp_size=2),
        make_args(output_dir=str(folder / "auto"), per_device_train_batch_size=2),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=make_tokenizer(),
        peft_config=UOEConfig(target_experts="auto"),
    )
    trainer.model(input_ids=IDS, labels=IDS).loss.backward()
    others = [name for name, p in trainer.model.named_parameters() if p.requires_grad and ".uoe_" not in name]
    return trainer.model.peft_config["default"].target_experts, others


def slices_of_split_stacks() -> list[bool]:
    """Whether slices of stacks come back from every way of splitting: evenly and not, by halves, over several axes."""
    line = init_device_mesh("cpu", (2,))
    plane = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    halves = _StridedShard(1, split_factor=2)
    same = []
    for shape in ((6, 4, 8), (5, 8, 3), (1, 4, 2), (3, 12)):
        stack = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        ways = [(line, [way]) for way in (Shard(0), Shard(1), Shard(-1), Replicate(), halves)]
        ways += [(plane, [Replicate(), Shard(1)]), (plane, [_StridedShard(0, split_factor=2), Shard(0)])]
        for mesh, placements in ways:
            split = distribute_tensor(stack, mesh, placements)
            same += [torch.equal(one_of_stack(split, index), stack[index]) for index in range(len(stack))]
    return same


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen: dict[str, Any] = {"ddp": on_ddp(folder)}
    pretend_accelerators()
    seen |= {name: on_sharded_model(name, folder) for name in SHARDED}
    seen["auto"] = found_experts(folder)
    seen["slices"] = slices_of_split_stacks()
    seen["fsdp_2"] = on_fsdp_2(folder)
    seen["refusals"] = refusals(folder)
    torch.save(seen, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
