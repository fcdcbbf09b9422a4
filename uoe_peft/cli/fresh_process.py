"""Load a saved adapter in a new Python process and compare its logits with those of the model that was saved.

python -m uoe_peft.cli.fresh_process BASE ADAPTER REFERENCE
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def reload_differs_by(
    base: Path, adapter: Path, *, dtype: str, input_ids: Tensor, logits: Tensor, reference: Path
) -> float:
    """Largest difference between `logits` and what base and adapter give when loaded in a new process.

    Args:
        base: Folder of the base model.
        adapter: Folder of the adapter.
        dtype: The base's, "bfloat16" say.
        input_ids: Shape `(B, S)`, without padding.
        logits: What the model gave before it was saved, shape `(B, S, V)`.
        reference: File through which both are passed on.

    Returns:
        Largest absolute difference; 0.0 where every logit is equal.

    Raises:
        RuntimeError: The new process failed.
    """
    save_file(
        {"input_ids": input_ids.contiguous(), "logits": logits.contiguous()},
        reference,
        metadata={"format": "pt"},
    )
    command = [sys.executable, "-m", __name__, str(base), str(adapter), str(reference), dtype]
    command.append(str(torch.get_num_threads()))  # the order of a sum depends on it
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the saved adapter could not be loaded in a new process:\n{done.stderr}")
    return float(done.stdout.split()[-1])


@torch.inference_mode()
def main(base: str, adapter: str, reference: str, dtype: str, num_threads: str) -> None:
    """Print the largest difference of the logits."""
    torch.set_num_threads(int(num_threads))
    expected = load_file(reference)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    logits = PeftModel.from_pretrained(model, adapter).eval()(input_ids=expected["input_ids"]).logits
    print((logits - expected["logits"]).abs().max().item())


if __name__ == "__main__":
    main(*sys.argv[1:])
