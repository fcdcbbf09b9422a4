"""Checkpoints in few bits, made plain while they are read, by transformers' own conversion."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.streaming.checkpoint import Checkpoint

# Pairs that are looked up at once: they stay in the processor's cache.
_PIECE = 2**14


class _Dequantize(Fp8Dequantize):
    """As its base, and for matrices whose last blocks are cut: DeepSeek-V3 has 576 rows in blocks of 128."""

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block = cast(Any, self.hf_quantizer.quantization_config).weight_block_size
        rows, columns = quantized.shape[-2:]
        grid = (-(-rows // block[0]), -(-columns // block[1])) if block is not None else None
        if grid is None or tuple(scales.shape[-2:]) != grid:
            return super()._dequantize_one(quantized, scales, output_dtype)
        missing = (0, grid[1] * block[1] - columns, 0, grid[0] * block[0] - rows)
        if any(missing):
            # As bytes: numbers of 8 bits cannot be padded.
            quantized = nn.functional.pad(quantized.view(torch.uint8), missing).view(quantized.dtype)
        plain = super()._dequantize_one(quantized, scales, output_dtype)
        return plain[..., :rows, :columns].contiguous()


def find_dequantizer(config: PreTrainedConfig, name: str) -> HfQuantizer | None:
    """What makes the tensors of a quantised checkpoint plain; None where they are.

    Args:
        config: Of the checkpoint.
        name: Of the checkpoint, for errors.

    Raises:
        UnsupportedModelError: Its form cannot be made plain layer by layer.
    """
    parts = (config, config.get_text_config())
    stored = next((form for part in parts if (form := getattr(part, "quantization_config", None))), None)
    if stored is None:
        return None
    try:
        quantizer = AutoHfQuantizer.from_config({**stored, "dequantize": True}, pre_quantized=True)
    except Exception as error:  # each form has its own: a package that is not there, an unknown name
        raise _unsupported(stored, name, f" ({error})") from error
    match quantizer:
        case FineGrainedFP8HfQuantizer():
            cast(Any, quantizer).get_load_operations = lambda: {"dequantize": _Dequantize}
        case Mxfp4HfQuantizer():
            pass
        case _:
            raise _unsupported(stored, name, "")
    return quantizer


def put_plain(weights: Tensor, scales: Tensor, out: Tensor) -> None:
    """Put a matrix in eight bits into one of plain numbers: bit for bit transformers' `Fp8Dequantize`, in less time.

    Two numbers at a time are looked up in a table of all pairs there are; then each block is multiplied with its scale.

    Args:
        weights: In float8_e4m3fn. Shape `(rows, columns)`, columns even.
        scales: One for each block. Shape `(a divisor of rows, a divisor of columns)`.
        out: Contiguous, on the CPU. Shape `(rows, columns)`.
    """
    wide = out if out.dtype == torch.float32 else torch.empty(weights.shape, dtype=torch.float32)
    pairs = weights.view(torch.uint8).view(torch.uint16).flatten()
    places = wide.view(torch.int64).flatten()
    for some, into in zip(pairs.split(_PIECE), places.split(_PIECE), strict=True):
        torch.index_select(_all_pairs(), 0, some.int(), out=into)
    (rows, columns), (down, across) = weights.shape, scales.shape
    wide.view(down, rows // down, across, columns // across).mul_(scales.float()[:, None, :, None])
    if wide is not out:
        out.copy_(wide)


@cache
def _all_pairs() -> Tensor:
    """Two float32 numbers, in one of 64 bits, for each two bytes."""
    first_and_second = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    return first_and_second.view(torch.float8_e4m3fn).float().view(torch.int64)


def without_quantisation(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same model in plain weights."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def plain_headers(skeleton: PreTrainedModel, checkpoint: Checkpoint, quantizer: HfQuantizer) -> dict[str, Tensor]:
    """What the headers of a quantised checkpoint become in a model, on the meta device, in the model's own dtypes.

    Raises:
        ValueError: A tensor cannot be made plain, or then has another shape than the model's.
    """
    mapping: Any = get_model_conversion_mapping(skeleton, hf_quantizer=quantizer)
    loading = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=mapping, hf_quantizer=quantizer)
    dtypes = {name: parameter.dtype for name, parameter in skeleton.named_parameters()}
    info, _ = convert_and_load_state_dict_in_model(skeleton, checkpoint.headers(), loading)
    problems = [*info.conversion_errors.items(), *sorted(info.mismatched_keys)]
    if problems:
        raise ValueError(
            f"tensors of {checkpoint.name} cannot be made plain ({len(problems)} of them); the first: {problems[0]}"
        )
    # What is not quantised was put in as it is stored.
    for name, dtype in dtypes.items():
        path, _, own_name = name.rpartition(".")
        module = skeleton.get_submodule(path)
        plain = module.get_parameter(own_name).to(dtype)
        module._parameters[own_name] = nn.Parameter(plain, requires_grad=False)
    return {name: tensor for name, tensor in skeleton.state_dict().items() if name not in info.missing_keys}


def _unsupported(stored: Any, name: str, why: str) -> UnsupportedModelError:
    form = dict(stored).get("quant_method", stored)
    return UnsupportedModelError(
        f"{name} is quantised ({form}), which is not made plain layer by layer{why}: only fp8 in blocks and mxfp4 are; "
        "stream the checkpoint that it was made from, in bfloat16 or float32"
    )
