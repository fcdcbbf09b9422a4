"""What withdrawing a request would leave, tried without deleting anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

from peft import PeftModel
from torch import nn


def check_withdrawable(model: nn.Module, names: list[str]) -> None:
    """Whether adapters can be switched off while others train.

    Raises:
        ValueError: One is not active, or is trained itself.
        TypeError: The model is no PEFT model.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a model with the adapters of earlier requests, got {type(model).__name__}")
    missing = sorted(set(names) - set(model.active_adapters))
    if missing:
        raise ValueError(
            f"earlier requests {missing} have no active adapter, active are {sorted(model.active_adapters)}; name each "
            "set by its adapter, and leave out requests that are withdrawn"
        )
    trained = model.get_model_status().requires_grad  # True, False or "irregular" by adapter
    own = [name for name in names if trained.get(name) is not False]
    if own:
        raise ValueError(f"the adapters {own} are trained, expected frozen ones of earlier requests; see add_request")


@contextmanager
def withdrawn(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Inside the context a model is what withdrawing a request would leave; which parameters train does not change.

    Args:
        model: A model with several active adapters.
        adapter_name: The one that is off inside.

    Raises:
        ValueError: The adapter is not active.
    """
    active, tuner = list(model.active_adapters), cast(Any, model.base_model)
    if adapter_name not in active:
        raise ValueError(f"adapter {adapter_name!r} is not active, active are {active}; name one of these")
    others = [name for name in active if name != adapter_name]
    # PEFT makes every parameter of the adapters that it switches on trainable.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    try:
        with nullcontext() if others else model.disable_adapter():
            if others:
                tuner.set_adapter(others)
                restore()
            yield
    finally:
        if others:
            tuner.set_adapter(active)
        restore()
