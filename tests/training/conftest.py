"""A tiny random Qwen2MoE, a tokenizer of characters, and small forget and retain sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM, TrainerCallback

from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.tuner import UOEConfig

TARGET = (1, 2)


def make_tokenizer() -> PreTrainedTokenizerFast:
    characters = [chr(code) for code in range(32, 127)]
    vocab = {token: i for i, token in enumerate(["|pad|", "|end|", *characters])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("\n"), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="|end|",
        pad_token="|pad|",
        chat_template="{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}",
    )


def make_model() -> Qwen2MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=97,
        hidden_size=32,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        intermediate_size=56,
        num_experts=6,
        num_experts_per_tok=3,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.2,
        router_aux_loss_coef=0.01,
    )
    return Qwen2MoeForCausalLM(config)


def make_sets() -> tuple[Dataset, Dataset]:
    forget = {
        "prompt": [f"who is {c}? " for c in "ABCDEFGH"],
        "completion": [c * (2 + i) for i, c in enumerate("stuvwxyz")],
    }
    retain = {"prompt": [f"where is {i}? " for i in range(11)], "completion": [f"at {7 * i}" for i in range(11)]}
    return Dataset.from_dict(forget), Dataset.from_dict(retain)


def make_args(**options: Any) -> UnlearningConfig:
    return UnlearningConfig(
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "log_routing": False,
            **options,
        }
    )


class KeepGradients(TrainerCallback):
    """The gradients of the first optimiser step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def with_uoe(model: torch.nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(model, UOEConfig(**{"target_experts": [TARGET], **options}))


def with_lora(model: torch.nn.Module) -> PeftModel:
    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> Qwen2MoeForCausalLM:
    return make_model()


@pytest.fixture
def uoe_model() -> PeftModel:
    return with_uoe(make_model())


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., UnlearningTrainer]:
    """A trainer on the small sets; `model` and any option can be given."""

    def make(
        model: Any = None,
        *,
        forget: Any = None,
        retain: Any = None,
        eval_dataset: Any = None,
        peft_config: Any = None,
        callbacks: Any = None,
        tokenizer: Any = None,
        formatting_func: Any = None,
        **options: Any,
    ) -> UnlearningTrainer:
        sets = make_sets()
        args = make_args(**{"output_dir": str(tmp_path / "out"), **options})
        return UnlearningTrainer(
            with_uoe(make_model()) if model is None else model,
            args,
            train_dataset=sets[0] if forget is None else forget,
            retain_dataset=sets[1] if retain is None else (None if retain == "none" else retain),
            eval_dataset=eval_dataset,
            processing_class=tokenizer or make_tokenizer(),
            peft_config=peft_config,
            callbacks=callbacks,
            formatting_func=formatting_func,
        )

    return make


@pytest.fixture
def sets() -> tuple[Dataset, Dataset]:
    return make_sets()


@pytest.fixture
def build() -> Any:
    """The builders of this file, for tests that need several models."""

    class Build:
        model = staticmethod(make_model)
        uoe = staticmethod(with_uoe)
        lora = staticmethod(with_lora)
        keep_gradients = KeepGradients

    return Build
