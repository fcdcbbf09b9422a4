"""What one of three processes finds when all of them attribute: run by `test_processes.py`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.training.conftest import make_args, make_model, make_sets, make_tokenizer
from uoe_peft import ExpertAttribution, StreamedModel, UOEConfig, attribute_experts
from uoe_peft.data.shares import Share, is_split
from uoe_peft.training import UnlearningTrainer

SCORES = ("gate", "token_ratio", "contrast", "ablation", "gradient")
OPTIONS: dict[str, Any] = {"batch_size": 3, "num_resamples": 20, "num_candidates": 3, "show_progress": False}


def attribute(model: Any, score: Any = "contrast", **options: Any) -> ExpertAttribution:
    """The call that is compared: 8 forget rows in batches of 3, 3, 2, and 11 retain rows."""
    forget, retain = make_sets()
    sets = {"forget_dataset": forget, "retain_dataset": retain}
    return attribute_experts(model, **{**sets, **OPTIONS, **options}, score=score, processing_class=make_tokenizer())


def tensors(found: ExpertAttribution) -> dict[str, torch.Tensor]:
    """All that an attribution says in numbers."""
    said = {"affinity": found.affinity}
    for name, use in (("forget", found.forget), ("retain", found.retain)):
        assert use is not None
        said |= {f"{name} {table}": getattr(use, table) for table in ("softmax", "applied", "token_ratio")}
        said[f"{name} counts"] = torch.tensor([use.num_sequences, use.num_tokens, use.top_k])
    if found.confidence is not None:
        said |= {name: torch.tensor(value) for name, value in vars(found.confidence).items() if name in ("margin_low",)}
        said |= {"low": found.confidence.low, "high": found.confidence.high}
        said["half_agreement"] = torch.tensor(found.confidence.half_agreement or 0.0)
    return said


def message(act: Any) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fails_in(rank: int) -> Any:
    """A model whose router says NaN in one process."""
    model = make_model()
    if dist.get_rank() == rank:
        torch.nn.init.constant_(model.model.layers[1].mlp.gate.weight, torch.nan)
    return model


def split() -> Any:
    model = make_model()
    router = model.model.layers[0].mlp.gate
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    router.weight = torch.nn.Parameter(distribute_tensor(router.weight.data, mesh, [Shard(0)]))
    return model


def train(folder: Path) -> list[tuple[int, int]]:
    forget, retain = make_sets()
    trainer = UnlearningTrainer(
        make_model(),
        make_args(output_dir=str(folder / "auto"), per_device_train_batch_size=2),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=make_tokenizer(),
        peft_config=UOEConfig(target_experts="auto"),
    )
    found: Any = trainer.model.peft_config["default"]
    return found.target_experts


def main(folder: str, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    forget, retain = make_sets()
    seen: dict[str, Any] = {score: tensors(attribute(make_model(), score)) for score in SCORES}
    model, tokens = make_model(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    seen["few"] = tensors(attribute(model, retain_dataset=retain.select(range(2))))
    seen["passes"] = len(tokens)
    streamed = StreamedModel.from_pretrained(f"{folder}/base", state_dir=f"{folder}/states", show_progress=False)
    seen["streamed"] = tensors(attribute(streamed))
    seen["errors"] = [
        message(lambda: attribute(fails_in(1))),
        message(lambda: attribute(make_model(), forget_dataset=forget.select(range(8 - rank)))),
        message(lambda: attribute(make_model(), forget_dataset=forget.select(range(8 * min(1, 2 - rank))))),
        message(lambda: attribute(make_model(), score="gate" if rank == 0 else "token_ratio")),
    ]
    seen["split"] = (is_split(split()), Share.of(split()), Share.of(make_model()))
    seen["alone"] = attribute(make_model(), "random").affinity if rank == 0 else None  # nobody waits for the others
    seen["auto"] = train(Path(folder))
    torch.save(seen, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
