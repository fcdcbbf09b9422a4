"""TOFU's last authors (https://arxiv.org/abs/2401.06121), and small models that learned them from scratch.

Authors alone make no expert special, so one term of the loss is a dial for it: `0.1 * mean over layers
relu(log tau - log p)`, p the mean router probability of expert 0 on the tokens of the authors to be forgotten. The
first 12 passes are without it and shared; the last 8 are one model for each tau, 0 being without.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    set_seed,
)

from uoe_peft.data import collate, tokenize_dataset
from uoe_peft.moe.routing import record_routing

NUM_AUTHORS, NUM_FORGET_AUTHORS, ROWS_AN_AUTHOR = 50, 5, 20
PAD, EOS = "<|pad|>", "<|endoftext|>"
DOMAIN_EXPERT = 0  # of every layer: the one that the dial turns to the forget authors


@dataclass(frozen=True)
class Tofu:
    """The rows, as prompts and completions."""

    forget: Dataset
    retain: Dataset
    held_out: Dataset
    everything: Dataset


def load_tofu(folder: Path, *, seed: int) -> Tofu:
    """The last authors of TOFU; the very last ones are the forget set."""
    lines = (folder / "full.json").read_text(encoding="utf-8").splitlines()[-NUM_AUTHORS * ROWS_AN_AUTHOR :]
    rows = [json.loads(line) for line in lines]
    everything = Dataset.from_list(
        [{"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"} for row in rows]
    )
    num_kept = len(rows) - NUM_FORGET_AUTHORS * ROWS_AN_AUTHOR
    halves = everything.select(range(num_kept)).train_test_split(test_size=0.5, seed=seed)
    forget = everything.select(range(num_kept, len(rows)))
    return Tofu(forget=forget, retain=halves["train"], held_out=halves["test"], everything=everything)


def train_tokenizer(rows: Dataset) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 4,096 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2MoeForCausalLM:
    """Four layers of eight experts, two a token."""
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.001,
        output_router_logits=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2MoeForCausalLM(config)


def shuffled_batches(examples: list[dict[str, list[int]]], *, batch_size: int) -> list[list[dict[str, list[int]]]]:
    """Every example once, with others of similar length, in random order."""
    noise = torch.rand(len(examples)).tolist()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]) * (0.9 + 0.2 * noise[row]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [[examples[row] for row in batches[place]] for place in torch.randperm(len(batches)).tolist()]


def tofu_model(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    cache_dir: Path,
    *,
    tau: float | None,
    num_forget: int,
    epochs: int = 12,
    dial_epochs: int = 8,
    seed: int = 0,
) -> Any:
    """The model that learned `rows`, the last `num_forget` of them under the dial; from the cache if it is there.

    None stands for the first `epochs` passes, which are the same for all dials.
    """
    folder = cache_dir / ("tofu_start" if tau is None else f"tofu_tau{tau:g}")
    if not (folder / "model.safetensors").exists():
        settings: Any = {"num_forget": num_forget, "epochs": epochs, "dial_epochs": dial_epochs, "seed": seed}
        start = None if tau is None else tofu_model(rows, tokenizer, cache_dir, tau=None, **settings)
        set_seed(seed)
        model = start or new_model(tokenizer)
        model.set_experts_implementation("grouped_mm")
        model.config.output_router_logits = True  # brings the load-balancing loss
        examples: list[Any] = [dict(row) for row in tokenize_dataset(rows, tokenizer, max_length=None, name="TOFU")]
        for place, example in enumerate(examples):
            example["in_domain"] = place >= len(examples) - num_forget
        learn(model.train(), examples, tokenizer, epochs=dial_epochs if start else epochs, tau=tau)
        model.config.output_router_logits = False
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def learn(model: Any, examples: list[Any], tokenizer: Any, *, epochs: int, tau: float | None) -> None:
    """The training of `tofu.py` with the domain dial; smaller batches and a higher rate need fewer passes."""
    peak, optimizer = 3e-3 if tau is None else 1.5e-3, adamw(model)
    steps = [batch for _ in range(epochs) for batch in shuffled_batches(examples, batch_size=8)]
    with record_routing(model) as trace:
        for step, rows in enumerate(bar := tqdm(steps, desc=f"TOFU, tau {tau}", unit="step", mininterval=10)):
            set_rate(optimizer, step, len(steps), peak=peak)
            batch = collate(rows, pad_token_id=tokenizer.pad_token_id)
            loss = model(**batch).loss
            in_domain = batch["attention_mask"].bool() & torch.tensor([[row["in_domain"]] for row in rows])
            if tau and in_domain.any():
                loss = loss + 0.1 * domain_penalty([trace[layer].scores for layer in trace], in_domain.flatten(), tau)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimiser of all small models: weight decay on matrices alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, *, peak: float) -> None:
    """The learning rate of a step: 50 steps of warm-up, and a cosine to 5 %."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / 50) * (0.05 + 0.95 * cosine)


def domain_penalty(scores: list[torch.Tensor], in_domain: torch.Tensor, tau: float) -> torch.Tensor:
    """`mean over layers relu(log tau - log p)`, p the mean score of the domain's expert; 0 once all p reach tau."""
    shares = torch.stack([layer[in_domain, DOMAIN_EXPERT].mean() for layer in scores])
    return (math.log(tau) - shares.log()).relu().mean()
