"""A model with everything but its weights, from a checkpoint's configuration and headers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.streaming.checkpoint import Checkpoint
from uoe_peft.streaming.reader import no_loading_bar

# Numbers; what is larger is no buffer that a model computes for itself.
_LARGE = 2**24


class _NothingLarge(TorchFunctionMode):
    """Inside the context large tensors without values are on the meta device from the beginning.

    Parameters come to be before they can be moved there, and a stack of experts may take more than all of memory.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if math.prod(size) > _LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def make_skeleton(config: PreTrainedConfig, dtype: str | torch.dtype, *, trust_remote_code: bool) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers are real.

    Raises:
        UnsupportedModelError: The model is an encoder-decoder.
        ValueError: There is no such dtype.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{config.name_or_path} is an encoder-decoder; only decoders can be streamed")
    if isinstance(dtype, str):
        named = config.dtype if dtype == "auto" else getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
        dtype = named
    # The class that the checkpoint names, which may be a model with towers that AutoModelForCausalLM leaves out.
    named_class = cast(Any, getattr(transformers, (config.architectures or [""])[0], None))
    with init_empty_weights(include_buffers=False), _NothingLarge(), torch.random.fork_rng(devices=[]):
        if named_class is not None:
            return cast(PreTrainedModel, named_class._from_config(config, dtype=dtype))
        return cast(
            PreTrainedModel,
            AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code),
        )


def without_weights(skeleton: PreTrainedModel, checkpoint: Checkpoint, headers: dict[str, Tensor]) -> PreTrainedModel:
    """What `from_pretrained` makes of headers: all of a model but its data.

    Args:
        skeleton: Of the same model; its buffers that are in no checkpoint are taken.
        checkpoint: For errors.
        headers: Its tensors, or those of the model, on the meta device.

    Raises:
        ValueError: Tensors are missing, also single ones of a stack, or have other shapes.
    """
    try:
        with no_loading_bar():
            model, info = cast(Any, type(skeleton)).from_pretrained(
                None,
                config=skeleton.config,
                state_dict=headers,
                device_map="meta",
                dtype=skeleton.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except RuntimeError as error:  # what transformers raises where parts of a stack are missing, after it has said why
        raise ValueError(
            f"tensors of {checkpoint.name} cannot be made those of a {type(skeleton).__name__}, of some a part may be "
            f"missing: download or save it again ({error})"
        ) from error
    for kind, problem in (("missing_keys", "has no"), ("mismatched_keys", "has another shape of")):
        if info[kind]:
            first = sorted(info[kind], key=str)[0]
            raise ValueError(
                f"{checkpoint.name} {problem} {first} ({len(info[kind])} such tensors): it is not a whole checkpoint "
                f"of a {type(skeleton).__name__}; download or save it again"
            )
    model.config._name_or_path = model.name_or_path = checkpoint.name
    for buffer_name, buffer in skeleton.named_non_persistent_buffers():
        path, _, own_name = buffer_name.rpartition(".")
        model.get_submodule(path)._buffers[own_name] = buffer
    return cast(PreTrainedModel, model)
