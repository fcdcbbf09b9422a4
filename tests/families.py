"""A tiny random model of every Mixture-of-Experts family that transformers has.

A family is a folder of `transformers.models`. Its default configuration is shrunk by the names of its attributes, so
that layer patterns, gates, routers and norms stay as the family configures them; :data:`OVERRIDES` says what a name
cannot tell. Hidden size, expert size, shared size, dense size, number of experts and vocabulary differ pairwise: a
square slice would hide a transposed one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.remote_code import RouterKind, listed_model

ConfigT = TypeVar("ConfigT", bound=PreTrainedConfig)

# Routed experts that are written without the decorator of the other families.
_OWN_CONTRACT = ("dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers")


def _families() -> list[str]:
    sources = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    decorated = {path.parent.name for path in sources if "use_experts_implementation" in path.read_text("utf-8")}
    return sorted(decorated.union(_OWN_CONTRACT))


FAMILIES = _families()

# Models as remote code writes them, with their experts in a list.
REMOTE_CODE: dict[str, RouterKind] = {"listed, router module": "module", "listed, linear router": "linear"}

# Families whose experts are in no storage that can be read, and why.
UNSUPPORTED = {
    "doge": "an expert is one row of an embedding, not an MLP",
    "jetmoe": "experts get tokens sorted by expert, from a router inside their own module; attention has experts, too",
}

SUPPORTED = [*(family for family in FAMILIES if family not in UNSUPPORTED), *REMOTE_CODE]

HIDDEN, EXPERT, SHARED, DENSE, EXPERTS, TOP_K, VOCAB, LAYERS = 32, 24, 40, 56, 6, 2, 100, 3

# What a configuration gets wherever it has the attribute.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "out_hidden_size", "projector_hidden_size"), HIDDEN),
    **dict.fromkeys(("output_channels", "output_dim", "downsample_hidden_size"), HIDDEN),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers", "depth"), LAYERS),
    **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "d_kv"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), DENSE),
    **dict.fromkeys(("mlp_dim", "projection_intermediate_size"), DENSE),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), EXPERT),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"), SHARED),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), SHARED),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"), TOP_K),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "max_source_positions", "position_embedding_size"), 64),
    **dict.fromkeys(("sliding_window", "index_topk", "rel_extent"), 64),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads", "n_groups", "index_n_heads", "o_groups"), 2),
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_position_embeddings", "ssm_state_size", "mamba_d_state", "router_hidden_size"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "mamba_dt_rank", "hidden_size_per_layer_input"), 8),
    "dense_intermediate_size": 72,
    "moe_hidden_size": 64,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "o_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "image_size": 28,
    "patch_size": 7,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
_DENSE_FIRST = ["dense", "sparse", "sparse"]

# What a family needs beside that; a dot leads into a part of the configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config.rope_theta": 10_000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8,
        "ffn_config.moe_top_k": TOP_K,
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": _DENSE_FIRST,
        "vision_config.sam_config.downsample_channels": [8, HIDDEN],
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"], "head_dim": 16, "num_key_value_heads": 1},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"head_dim": 12, "shared_experts_intermediate_size": EXPERT, "per_layer_config": {}},
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [EXPERT, 20],
        "text_config.rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True, "global_head_dim": 16},
    "glm4v_moe": {"text_config.rope_parameters": _MROPE | {"mrope_section": [2, 1, 1]}},
    "glm5_next": {"text_config.qk_rope_head_dim": 0},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"zero_expert_num": 3},
    "muse_spark": {
        "audio_config.num_hidden_layers": 4,
        "audio_config.hidden_sizes": (8, 8, 8, 8),
        "audio_config.depths": (1, 1, 1, 1),
        "audio_config.patch_sizes": (2, 2, 2, 2),
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"]},
    "phimoe": {"router_jitter_noise": 0.3},  # only scores this near to the best one pass a gradient
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 12,
    },
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": (8, HIDDEN)},
    "zaya": {"num_experts_per_tok": 1},
}

# Families whose language model is also part of a larger one, with towers for images or speech.
WHOLE = ("aria", "dots3_note", "gemma4", "inkling", "minimax_m3_vl", "qwen3_5_moe", "qwen4_exp")
_WHOLE_OVERRIDES: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "vision_config.mlp_layer_types": _DENSE_FIRST,
        "vision_config.per_layer_config": {},
        "vision_config.adapter_in_dim": HIDDEN,
        "vision_config.adapter_out_dim": HIDDEN,
        "audio_config.adapter_input_size": HIDDEN,
        "audio_config.adapter_out_dim": HIDDEN,
    },
}

# The model to build, where it is not the first of the usual kinds.
_CLASSES = {
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
_KINDS = ("ForCausalLM", "ForConditionalGeneration", "ForTokenClassification")


def model_class(family: str, *, kinds: Sequence[str] = _KINDS) -> type[PreTrainedModel]:
    """The family's causal language model; else the smallest of its models that contains one."""
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    ]
    for ending in (_CLASSES.get(family, ""), *kinds):
        for candidate in classes:
            if ending and candidate.__name__.endswith(ending):
                return candidate
    raise LookupError(f"no language model in {module.__name__}")


def build(family: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model of a family in evaluation mode; every call returns the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # what the model's own initialisation draws stays in vectors, as their mean
        model = listed_model(REMOTE_CODE[family]) if family in REMOTE_CODE else model_class(family)(_config(family))
    randomise(model)
    return model.eval().to(dtype)


def build_whole(family: str) -> PreTrainedModel:
    """The model with towers that holds a family's language model; one of :data:`WHOLE`."""
    cls = model_class(family, kinds=("ForConditionalGeneration",))
    overrides = {f"text_config.{name}": value for name, value in OVERRIDES.get(family, {}).items()}
    model = cls(tiny_config(_config_class(cls), overrides | _WHOLE_OVERRIDES.get(family, {})))
    randomise(model)
    return model.eval()


def token_ids() -> Tensor:
    """Two sequences of ordinary tokens. Shape `(2, 9)`."""
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """What the model says about the tokens: logits, or hidden states where it has no head. Shape `(B, S, ·)`."""
    config = cast(PreTrainedConfig, model.config)
    decoder_inputs = {"decoder_input_ids": input_ids.flip(1)} if config.is_encoder_decoder else {}
    return cast(Tensor, model(input_ids=input_ids, use_cache=False, **decoder_inputs)[0])


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Replace every weight by a random value: zero routers and biases, or identity norms, would hide mistakes.

    Matrices get the scale of their inputs; vectors and saved float buffers get noise on top of what they are.
    """
    generator = torch.Generator().manual_seed(0)
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, tensor in {**dict(model.named_parameters()), **buffers}.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(".tid2eid"):  # expert ids of each token id: distinct ones
            tensor.copy_(torch.rand(len(tensor), EXPERTS, generator=generator).argsort()[:, :TOP_K])
        elif tensor.dim() >= 2 and tensor.is_floating_point():
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * noise)


@cache
def _config(family: str) -> PreTrainedConfig:
    return tiny_config(_config_class(model_class(family)), OVERRIDES.get(family, {}))


def _config_class(cls: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    assert cls.config_class is not None
    return cls.config_class


def tiny_config(config_class: type[ConfigT], overrides: Mapping[str, Any]) -> ConfigT:
    """A configuration of a class with its sizes, and those of its parts, shrunk."""
    default = config_class()
    given = _tiny_values(default)
    for name in config_class.sub_configs or {}:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            start = f"{name}."
            own = {key.removeprefix(start): value for key, value in overrides.items() if key.startswith(start)}
            given[name] = tiny_config(type(part), own)
    return config_class(**given | {name: value for name, value in overrides.items() if "." not in name})


def _tiny_values(default: PreTrainedConfig) -> dict[str, Any]:
    names = {field.name for field in fields(default)}
    values = {name: size for name, size in SIZES.items() if name in names}
    get = vars(default).get
    # What is equal in the family stays equal.
    if "num_key_value_heads" in values and get("num_key_value_heads") == get("num_attention_heads"):
        values["num_key_value_heads"] = values["num_attention_heads"]
    if "qk_rope_head_dim" in values and get("head_dim") == get("qk_rope_head_dim"):
        values["head_dim"] = values["qk_rope_head_dim"]
    for name in names:
        pattern = get(name)
        if isinstance(pattern, list) and len(pattern) == get("num_hidden_layers"):
            values[name] = _shortened(pattern)
    return values


def _shortened(pattern: list[Any]) -> list[Any]:
    """The kinds of layers in the order of their first appearance, the last of them repeated to fill the layers."""
    kinds = list(dict.fromkeys(pattern))
    return (kinds + [kinds[-1]] * LAYERS)[:LAYERS]
