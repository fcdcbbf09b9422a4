"""Trains a few steps, on one process or under torchrun, and writes what it saw: run by `test_distributed.py`.

Usage: distributed_run.py OUTPUT_FOLDER BATCH_SIZE_PER_PROCESS [--starve-rank-1] [--rmu]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from conftest import KeepGradients, make_args, make_model, make_sets, make_tokenizer, with_uoe

from uoe_peft.moe import find_moe_blocks
from uoe_peft.training import UnlearningTrainer


def never_select(expert: int):
    """A hook on an experts module: no token reaches `expert`."""

    def hook(experts, args):
        hidden, index, weights = args
        return hidden, torch.where(index == expert, (index + 1) % 6, index), weights

    return hook


def main(output: Path, batch_size: int, *, starve: bool, rmu: bool) -> None:
    torch.set_num_threads(1)
    model = with_uoe(make_model())
    rank = int(os.environ.get("RANK", "0"))
    if starve and rank == 1:
        find_moe_blocks(model)[1].experts.register_forward_pre_hook(never_select(2))
    forget, retain = make_sets()
    keep = KeepGradients()
    trainer = UnlearningTrainer(
        model,
        make_args(
            output_dir=str(output),
            per_device_train_batch_size=batch_size,
            max_steps=4,
            max_grad_norm=0,
            calibrate="retain",
            calibrate_metric="probability",
            calibrate_retain_share=0.9999,
            **({"forget_loss": "rmu", "retain_loss": "embed_diff", "logging_steps": 3} if rmu else {}),
        ),
        train_dataset=forget,
        retain_dataset=retain,
        eval_dataset={"forget": forget, "retain": retain},
        processing_class=make_tokenizer(),
        callbacks=[keep],
    )
    pairs, caches, from_cache = [], [], []
    compute_loss = trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        pairs.append(list(zip(inputs["forget"]["index"].tolist(), inputs["retain"]["index"].tolist(), strict=True)))
        caches[:] = [path.name for path in Path(tempfile.gettempdir()).glob("uoe-prefix-*")]
        from_cache.append(trainer.reuse.from_cache)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    trainer.train()
    gradients = {name.removeprefix("module."): gradient for name, gradient in keep.gradients.items()}
    state = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    logs = trainer.state.log_history[0] if rank == 0 else {}
    seen = {"gradients": gradients, "pairs": pairs, "state": state, "logs": logs}
    seen |= {"caches": caches, "from_cache": from_cache}
    seen |= {"strength": model.peft_config["default"].strength, "choice": trainer.strength_choice.curve}
    torch.save(seen, output / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), starve="--starve-rank-1" in sys.argv, rmu="--rmu" in sys.argv)
