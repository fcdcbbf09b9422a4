"""What an unlearning costs: parameters, bytes, and the time and memory of its evaluation."""

from __future__ import annotations

import sys
import time

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn


def adapter_cost(model: PeftModel) -> dict[str, float]:
    """Size of the active adapter.

    Args:
        model: A model with an adapter.

    Returns:
        `adapter_parameters`; `adapter_share`, of the base model's parameters; `adapter_bytes` of its tensors as they
        would be saved. What training needed is not known here.
    """
    state = _state(model, model.active_adapter)
    own = sum(tensor.numel() for tensor in state.values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    adapters = sum(sum(tensor.numel() for tensor in _state(model, name).values()) for name in model.peft_config)
    return {
        "adapter_parameters": own,
        "adapter_share": own / max(1, everything - adapters),
        "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    }


def changed_cost(model: nn.Module, base_model: nn.Module) -> dict[str, float]:
    """Size of what differs from the base, under the names of `adapter_cost`: what would have to be kept of a model.

    Args:
        model: A model that was trained in full.
        base_model: What it was before, with the same parameters.
    """
    before = dict(base_model.named_parameters())
    changed = [own for name, own in model.named_parameters() if not torch.equal(own.cpu(), before[name].cpu())]
    number = sum(parameter.numel() for parameter in changed)
    return {
        "adapter_parameters": number,
        "adapter_share": number / max(1, sum(parameter.numel() for parameter in model.parameters())),
        "adapter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in changed),
    }


def _state(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    # "auto" would ask the Hub whether the vocabulary has grown.
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


class CostClock:
    """Seconds and peak memory since it was made.

    The peak is an accelerator's where there is one, since the clock was made; else the whole process', since it began.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, float]:
        """`evaluation_seconds` and `peak_memory_bytes`."""
        return {"evaluation_seconds": time.perf_counter() - self._started, "peak_memory_bytes": float(_peak())}


def _peak() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
