"""Merge an adapter into a checkpoint on disk, without loading the model, and take it out again.

python examples/export_merged.py
"""

import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from uoe_peft import UOEConfig, merge_checkpoint, unmerge_checkpoint
from uoe_peft.testbed import checkpoint_path

base = checkpoint_path("base")
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), UOEConfig(target_experts=[(0, 4)], init_weights=False)
    )
    model.save_pretrained(folder / "adapter")

    print(merge_checkpoint(base, folder / "adapter", folder / "merged", backup=folder / "backup").summary())
    plain = AutoModelForCausalLM.from_pretrained(folder / "merged")  # transformers alone: no adapter, no uoe_peft
    print(f"{type(plain).__name__} from {len(list((folder / 'merged').iterdir()))} files")

    unmerge_checkpoint(folder / "merged", folder / "backup", folder / "restored")
    original, restored = (load_file(place / "model.safetensors") for place in (base, folder / "restored"))
    assert all(torch.equal(original[key], restored[key]) for key in original)
    print("restored: every bit is as it was")
