"""Tiny dense models of several families, with pairwise different sizes, and groups of their neurons."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.families import randomise
from tests.training.conftest import make_tokenizer
from uoe_peft.dense import NeuronGroups

HIDDEN, NEURONS, GROUPS, LAYERS, VOCAB = 32, 48, 6, 3, 97

_KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama with biases": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 12}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 12}),
}
FAMILIES = tuple(_KINDS)


def make_model(family: str = "llama", *, neurons: int = NEURONS) -> PreTrainedModel:
    """The same random weights in every call."""
    config_class, model_class, further = _KINDS[family]
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=neurons,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **further,
    )
    model = model_class(config)
    randomise(model)
    return model.eval()


def make_groups(*, seed: int = 3, neurons: int = NEURONS) -> NeuronGroups:
    return NeuronGroups.random(dict.fromkeys(range(LAYERS), neurons), GROUPS, seed=seed)


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def token_ids() -> Tensor:
    return torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture
def groups() -> NeuronGroups:
    return make_groups()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def forget() -> Dataset:
    letters = "stuvwxyz"
    return Dataset.from_dict(
        {
            "prompt": [f"who is {c}? " for c in "ABCDEFGH"],
            "completion": [c * (2 + i) for i, c in enumerate(letters)],
        }
    )


@pytest.fixture
def retain() -> Dataset:
    return Dataset.from_dict(
        {"prompt": [f"where is {i}? " for i in range(11)], "completion": [f"at {7 * i}" for i in range(11)]}
    )
