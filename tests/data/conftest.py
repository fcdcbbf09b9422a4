"""A tokenizer of characters, with one merge, so that every expected id can be read off the text."""

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    characters = [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate(["|pad|", "|end|", *characters, "ab"])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="|end|", pad_token="|pad|", chat_template=chat_template
    )
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def tiny_sft_dataset(tmp_path):
    """What TRL's `SFTTrainer` makes of a data set."""

    def prepare(rows: Dataset, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> Dataset:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        args = SFTConfig(
            output_dir=str(tmp_path), max_length=max_length, bf16=False, use_cpu=True, activation_checkpointing=False
        )
        trainer = SFTTrainer(LlamaForCausalLM(config), args, train_dataset=rows, processing_class=tokenizer)
        return trainer.train_dataset

    return prepare
