"""A tokenizer of characters, small sets, and a model whose routing can be set by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import build

FORGET, RETAIN, SHARED = "abcde", "vwxyz", " .,"


def make_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    characters = [chr(code) for code in range(32, 127)]
    vocab = {token: index for index, token in enumerate(["|pad|", "|end|", *characters])}  # 97 of the models' 100
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="|end|", pad_token="|pad|", padding_side=padding_side
    )


def make_texts(letters: str, *, num_rows: int, seed: int) -> list[str]:
    """Rows of 5 to 17 characters."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 18, (num_rows,), generator=generator).tolist()
    return ["".join(letters[i] for i in torch.randint(len(letters), (n,), generator=generator)) for n in lengths]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def forget_set() -> Dataset:
    return Dataset.from_dict({"text": make_texts(FORGET + SHARED, num_rows=23, seed=1)})


@pytest.fixture
def retain_set() -> Dataset:
    return Dataset.from_dict({"text": make_texts(RETAIN + SHARED, num_rows=19, seed=2)})


@pytest.fixture
def model() -> PreTrainedModel:
    """A tiny random model: 3 layers, 6 experts, 2 for each token."""
    return build("qwen2_moe")


Plant = Callable[..., None]


@pytest.fixture
def plant(tokenizer: PreTrainedTokenizerFast) -> Plant:
    """Make the router of the first layer send tokens of some letters to an expert."""

    @torch.no_grad()
    def planted(model: PreTrainedModel, expert_idx: int, letters: str, *, strength: float) -> None:
        layer = model.model.layers[0]
        # Without attention the router reads the token's own embedding.
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        ids = tokenizer(letters)["input_ids"]
        embeddings = layer.post_attention_layernorm(model.model.embed_tokens.weight)  # (V, H)
        is_letter = torch.zeros(len(embeddings)).index_fill_(0, torch.tensor(ids), 1)
        # Least squares: the row whose product with an embedding is `strength` for the letters, 0 for other tokens.
        used = torch.tensor(tokenizer(FORGET + RETAIN + SHARED)["input_ids"])
        row = torch.linalg.lstsq(embeddings[used], strength * is_letter[used, None]).solution[:, 0]
        layer.mlp.gate.weight[expert_idx] = row

    return planted
