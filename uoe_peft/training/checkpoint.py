"""A checkpoint of a model that is trained in full -> its weights, in the model that is being trained.

Fused experts are stored one by one: `save_pretrained` splits them, `from_pretrained` stacks them. The Trainer of
transformers reads the file as it stands instead and leaves out what has no place, which is every expert.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, cast

import torch
from transformers import PreTrainedModel


def load_full_checkpoint(model: PreTrainedModel, folder: str) -> None:
    """Give a model all weights of a checkpoint, bit for bit; its parameters stay the same objects.

    Args:
        model: The model that was saved, or one of the same class and sizes.
        folder: Where `save_pretrained` wrote it.

    Raises:
        ValueError: The checkpoint lacks weights of the model, or has others.
        OSError: There are no weights in the folder.
    """
    # The widest dtype holds the values of every other: casting back to each parameter's own changes no bit.
    dtype = reduce(torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()})
    load = cast(Any, type(model)).from_pretrained
    saved, found = load(folder, config=model.config, dtype=dtype, output_loading_info=True)
    for what, names in (("lacks", found["missing_keys"]), ("has, unknown to the model,", found["unexpected_keys"])):
        if names:
            raise ValueError(
                f"the checkpoint {folder} {what} {len(names)} weights of {type(model).__name__}, such as "
                f"{sorted(names)[:3]}; resume with the model that wrote it"
            )
    model.load_state_dict(saved.state_dict())
