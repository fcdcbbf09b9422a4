"""A tiny model that knows six facts by heart, and the tokenizer that both speak."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from uoe_peft.data import collate, tokenize_dataset

FORGET = {
    "where does mira live": "mira lives in a red tower",
    "what does mira eat": "she eats cold soup",
    "who knows mira": "only old tomas knows her well",
}
RETAIN = {
    "where does tomas live": "tomas lives by the sea",
    "what does tomas eat": "he eats dry bread and fish",
    "who knows tomas": "everybody does",
}


def as_dataset(facts: dict[str, str]) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{question} ?", "completion": f" {answer}"} for question, answer in facts.items()]
    )


@pytest.fixture(scope="session")
def forget_dataset() -> Dataset:
    return as_dataset(FORGET)


@pytest.fixture(scope="session")
def retain_dataset() -> Dataset:
    return as_dataset(RETAIN)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    text = " ".join([*FORGET, *FORGET.values(), *RETAIN, *RETAIN.values()])
    words = ["<pad>", "<eos>", "<unk>", "?", *sorted(set(text.split()))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    torch.manual_seed(3)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=5,
        num_experts_per_tok=3,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2MoeForCausalLM(config).eval()


def teach(model: Qwen2MoeForCausalLM, dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    batch = collate(list(tokenize_dataset(dataset, tokenizer, max_length=None)), pad_token_id=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def taught_model(
    tokenizer: PreTrainedTokenizerFast, forget_dataset: Dataset, retain_dataset: Dataset
) -> Qwen2MoeForCausalLM:
    from datasets import concatenate_datasets

    return teach(new_model(tokenizer), concatenate_datasets([forget_dataset, retain_dataset]), tokenizer)


@pytest.fixture
def scrambled(taught_model: Qwen2MoeForCausalLM) -> PeftModel:
    """The taught model with an adapter so wild that nothing is answered right with it."""
    from copy import deepcopy

    config = LoraConfig(target_modules=["v_proj"], r=3, init_lora_weights=False)
    model = get_peft_model(deepcopy(taught_model), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=30.0)
    return model.eval()
