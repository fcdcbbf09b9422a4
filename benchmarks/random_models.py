"""The models that speed is measured on: real architectures with random weights, and random tokens.

"default" has the size that the targets are set for (168 M parameters); the scales that are named after a published
model have its configuration, in bfloat16 where the machine is fast in it, and are for a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen3MoeConfig

from uoe_peft.data.encoding import example_id
from uoe_peft.losses import mask_to_top_k
from uoe_peft.moe.routing import RoutingTrace, record_routing
from uoe_peft.precision import fast_dtype

Scale = Literal["small", "default", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"]

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 8,
    "num_experts": 8,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
SIZES: dict[Scale, dict[str, Any]] = {
    "small": SMALL,
    "default": SMALL
    | {
        "hidden_size": 512,
        "moe_intermediate_size": 384,
        "shared_expert_intermediate_size": 384,
        "intermediate_size": 384,
        "num_experts": 32,
        "vocab_size": 8192,
    },
    "qwen1.5-moe-a2.7b": {
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_experts": 60,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Setting:
    """What is run: a model, and the tokens of a batch."""

    scale: Scale
    num_layers: int
    num_experts: int
    vocab_size: int
    target_layer: int
    batch_size: int
    length: int
    dtype: str
    device: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `setting_of` reads, and the number of threads."""
    parser.add_argument("--scale", choices=get_args(Scale), default="default")
    for name in ("num_layers", "num_experts", "vocab_size"):
        parser.add_argument(f"--{name}", type=int, help="None: the scale's own.")
    parser.add_argument("--target_layer", type=int, help="None: at three quarters of the depth.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", help="None: float32; at a published model's scale bfloat16, if it is fast.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)


def setting_of(arguments: argparse.Namespace) -> Setting:
    """The setting that the options describe."""
    sizes = SIZES[arguments.scale]
    num_layers = arguments.num_layers or sizes["num_hidden_layers"]
    own_dtype = torch.float32
    if arguments.scale not in ("small", "default"):
        own_dtype = fast_dtype(torch.bfloat16, arguments.device)
    return Setting(
        scale=arguments.scale,
        num_layers=num_layers,
        num_experts=arguments.num_experts or sizes["num_experts"],
        vocab_size=arguments.vocab_size or sizes["vocab_size"],
        target_layer=3 * num_layers // 4 if arguments.target_layer is None else arguments.target_layer,
        batch_size=arguments.batch_size,
        length=arguments.length,
        dtype=arguments.dtype or str(own_dtype).removeprefix("torch."),
        device=arguments.device,
    )


def base_model(setting: Setting) -> PreTrainedModel:
    """The model, on its device, in training mode; every call gives the same weights."""
    config_class = Qwen3MoeConfig if setting.scale == "qwen3-30b-a3b" else Qwen2MoeConfig
    sizes = SIZES[setting.scale] | {
        "num_hidden_layers": setting.num_layers,
        "num_experts": setting.num_experts,
        "vocab_size": setting.vocab_size,
        "experts_implementation": "grouped_mm",
    }
    torch.manual_seed(0)
    with torch.device(setting.device):
        config = config_class(**sizes)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype)).train()


def random_batch(setting: Setting, *, seed: int = 0) -> dict[str, Tensor]:
    """A batch without padding; the second half of each row is its answer."""
    shape = (setting.batch_size, setting.length)
    ids = torch.randint(3, setting.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : setting.length // 2] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch["id"] = torch.tensor([example_id(*row) for row in zip(ids.tolist(), labels.tolist(), strict=True)])
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


def busiest_expert(model: PreTrainedModel, input_ids: Tensor, layer_idx: int) -> int:
    """The layer's expert with the most tokens: attribution picks busy experts, and a busy one costs most."""
    return int(_routing(model, input_ids)[layer_idx].top_k_index.flatten().bincount().argmax())


def esft_experts(model: PreTrainedModel, input_ids: Tensor, *, share: float) -> list[tuple[int, int]]:
    """Of each layer the best experts that together hold a share of the affinity, https://arxiv.org/abs/2407.01906."""
    chosen: list[tuple[int, int]] = []
    for layer_idx, layer in _routing(model, input_ids).items():
        affinity = mask_to_top_k(layer.scores, layer.top_k_index).mean(dim=0)
        values, order = (affinity / affinity.sum()).sort(descending=True)
        number = int((values.cumsum(dim=0) < share).sum()) + 1
        chosen += [(layer_idx, expert_idx) for expert_idx in order[:number].tolist()]
    return chosen


@torch.no_grad()
def _routing(model: PreTrainedModel, input_ids: Tensor) -> RoutingTrace:
    with record_routing(model) as trace:
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    return trace
