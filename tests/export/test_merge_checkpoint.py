"""A merge on disk is the merge in memory, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.export.conftest import FAMILIES, adapted, assert_same_bits, save_base, tensors
from uoe_peft.export import merge_checkpoint, unmerge_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("delta_type", ["full", "low_rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_on_disk_gives_the_bits_of_merging_in_memory(
    family: str, delta_type: str, dtype: torch.dtype, model_of: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    base = save_base(model_of(family, dtype), tmp_path / "base")
    model = adapted(model_of(family, dtype), delta_type=delta_type)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    before = tensors(base)
    edit = merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged", backup=tmp_path / "backup")
    merged = tensors(tmp_path / "merged")
    assert_same_bits(merged, tensors(tmp_path / "expected"))
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    assert changed == {tensor.tensor for tensor in edit.tensors}
    assert edit.shards is not None and edit.shards.linked
    unmerge_checkpoint(tmp_path / "merged", tmp_path / "backup", tmp_path / "restored")
    for path in base.iterdir():
        assert path.read_bytes() == (tmp_path / "restored" / path.name).read_bytes()
