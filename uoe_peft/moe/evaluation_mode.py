"""A model without dropout, for as long as it is only asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Inside the context the model has no dropout; after it every module is in the mode that it was in.

    Args:
        model: Any model; parts of it may be in another mode than the rest.
        gradients: Whether autograd records inside the context.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        # Not `train()`, which would put all parts of a module into one mode.
        for module, training in modes.items():
            module.training = training
