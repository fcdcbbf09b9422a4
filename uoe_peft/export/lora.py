"""A UOE adapter as plain LoRA, which loads where this package is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from uoe_peft.export.checkpoint import Checkpoint
from uoe_peft.export.edits import SliceEdit, located, slice_edits
from uoe_peft.export.factors import Factors, factorise
from uoe_peft.export.lora_layouts import dense_layout, peft_layout, per_expert_layout
from uoe_peft.export.neurons import in_groups
from uoe_peft.export.output import appearing_at_once, check_vacant
from uoe_peft.export.saved_adapter import WEIGHTS, SavedAdapter

LoraFormat = Literal["peft", "per_expert"]
_RANDOM_INPUTS = 4096


@dataclass(frozen=True)
class DroppedRouter:
    """What a router's delta would have done.

    Attributes:
        layer_idx: Decoder layer.
        relative_norm: Norm of the delta by the norm of the router's matrix.
        changed_choices: Share of random inputs, normally distributed, whose highest-scored expert is another with it.
    """

    layer_idx: int
    relative_norm: float
    changed_choices: float


@dataclass(frozen=True)
class LoraExport:
    """What was written.

    Attributes:
        output: The folder.
        format: Which layout.
        rank: The largest of any tensor.
        errors: Relative error of each slice in Frobenius norm, by its path; 0 where the export is exact.
        dropped_routers: Router deltas that are not in it.
        num_bytes: Size of the weights.
    """

    output: Path
    format: LoraFormat
    rank: int
    errors: dict[str, float]
    dropped_routers: tuple[DroppedRouter, ...]
    num_bytes: int

    def summary(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.output}: format {self.format}, rank {self.rank}, {self.num_bytes:,} bytes"]
        lines += [f"relative error {error:.3g}  {name}" for name, error in self.errors.items()]
        lines += [
            f"router of layer {router.layer_idx} left out: {router.relative_norm:.3g} of its norm, and "
            f"{router.changed_choices:.1%} of random inputs go to another expert"
            for router in self.dropped_routers
        ]
        return "\n".join(lines)


def export_lora(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    format: LoraFormat = "peft",
    rank: int | None = None,
    max_error: float | None = None,
    drop_router: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoraExport:
    """Write an adapter as LoRA.

    Low-rank deltas are written exactly. A full delta of an expert becomes the nearest of a rank, or within an error.
    Of a dense model that was factorized, the LoRA is one of the dense model's own linear layers, in either format.

    Args:
        adapter: A saved UOE adapter: a folder, or a name on the Hub.
        output: Folder to make; it must not exist, or be empty.
        base: The model that it is for, likewise; only its configuration is read, and routers that are left out.
        format: "peft": stacked experts, for stock PEFT, routers included. "per_expert": a pair for each matrix of each
            expert, for vLLM, SGLang and llama.cpp, which cannot edit routers.
        rank: The most that an expert's delta may have; None: as many as it takes.
        max_error: The largest relative error of a full delta in Frobenius norm, between 0 and 1; with `rank`, both
            must hold.
        drop_router: Leave the routers' deltas out; what they would have done is measured.
        revision: Of a base on the Hub.
        trust_remote_code: As in transformers, for a model whose code is not part of it.

    Returns:
        Ranks, errors and size.

    Raises:
        ValueError: The adapter does not fit the base; its full deltas need a rank or an error; the format cannot carry
            routers or has no names for this family; a limit is out of range; `output` is not empty.
    """
    _check_options(format, rank, max_error)
    target = Path(output).absolute()
    check_vacant(target)
    saved, checkpoint = SavedAdapter.open(adapter), Checkpoint.open(base, revision=revision)
    model = checkpoint.meta_model(trust_remote_code=trust_remote_code)
    edits = slice_edits(saved, model)
    routers = [edit for edit in edits if edit.expert_idx is None]
    if routers and format == "per_expert" and not drop_router:
        raise ValueError(
            f'format="per_expert" cannot carry the deltas of the routers of layers {[e.layer_idx for e in routers]}: '
            "ship the merged weights (merge_checkpoint), or leave them out with drop_router=True"
        )
    dropped = [_dropped(edit, checkpoint, model) for edit in routers] if drop_router else []
    kept = [edit for edit in edits if edit.expert_idx is not None or not drop_router]
    factors = [factorise(edit, rank=rank, max_error=max_error) for edit in kept]
    layout = dense_layout if in_groups(model) else peft_layout if format == "peft" else per_expert_layout
    config, tensors = layout(model, factors, saved.config.base_model_name_or_path)
    with appearing_at_once(target) as folder:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        num_bytes = (folder / WEIGHTS).stat().st_size
    errors = {_name(one): one.error for one in factors}
    return LoraExport(target, format, max(one.rank for one in factors), errors, tuple(dropped), num_bytes)


def _check_options(format: str, rank: int | None, max_error: float | None) -> None:
    if format not in get_args(LoraFormat):
        raise ValueError(f"format must be one of {get_args(LoraFormat)}, got {format!r}")
    if rank is not None and (isinstance(rank, bool) or int(rank) != rank or rank < 1):
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(f"max_error must be at least 0 and less than 1, got {max_error!r}")


def _dropped(edit: SliceEdit, checkpoint: Checkpoint, model: PreTrainedModel) -> DroppedRouter:
    weight = _base_matrix(edit, checkpoint, model)
    delta = edit.delta.dense(edit.position, transposed=edit.transposed)
    inputs = torch.randn(_RANDOM_INPUTS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    before, after = (inputs @ matrix.T for matrix in (weight, weight + delta))
    changed = (before.argmax(dim=-1) != after.argmax(dim=-1)).float().mean()
    return DroppedRouter(edit.layer_idx, float(delta.norm() / weight.norm()), float(changed))


def _base_matrix(edit: SliceEdit, checkpoint: Checkpoint, model: PreTrainedModel) -> Tensor:
    """A router's matrix, in float32."""
    (piece,) = located(edit, checkpoint, model)
    file = checkpoint.shard(checkpoint.weight_map[piece.tensor])
    stored = file.read_rows(piece.tensor, range(piece.first_row, piece.first_row + piece.num_rows)).float()
    return stored.T if piece.transposed else stored


def _name(factors: Factors) -> str:
    edit = factors.edit
    expert = "" if edit.expert_idx is None else f"[{edit.expert_idx}]"
    return f"{edit.target.parameter}{expert}"
