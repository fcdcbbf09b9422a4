"""What a dense model is trained with that is not put into groups: losses that read a layer, and the prefix cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PromptTuningConfig
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from tests.dense.conftest import FAMILIES, HIDDEN, LAYERS, make_model
from tests.training.conftest import make_args
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.segments import find_layers, run_until_layer
from uoe_peft.training import UnlearningTrainer


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=3, target_modules=["down_proj"], task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_enters_a_layer_of_a_dense_model(family: str) -> None:
    model = make_model(family)
    ids = torch.tensor([[5, 9, 44, 31, 7, 2], [8, 3, 12, 60, 4, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**inputs, output_hidden_states=True).hidden_states
    for layer_idx in range(1, LAYERS):
        found = run_until_layer(model, layer_idx, inputs)
        assert isinstance(found, Tensor) and torch.equal(found, expected[layer_idx])


def test_layers_under_another_name_are_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4))
    with pytest.raises(
        UnsupportedModelError, match="GPT2LMHeadModel has neither routed experts nor a decoder with a list"
    ):
        find_layers(model)


@pytest.mark.parametrize(("routers", "message"), [(0, "no router beside"), (2, "several Mixture-of-Experts blocks")])
def test_experts_that_cannot_be_read_are_not_taken_for_a_dense_model(routers: int, message: str) -> None:
    model = make_model()
    for number in range(max(1, routers)):
        block, experts = nn.Module(), nn.Module()
        experts.gate_up_proj = nn.Parameter(torch.zeros(5, 2 * 12, HIDDEN))
        experts.down_proj = nn.Parameter(torch.zeros(5, HIDDEN, 12))
        block.experts = experts
        if routers:
            block.gate = nn.Linear(HIDDEN, 5, bias=False)
        setattr(model.model.layers[1], f"block_{number}", block)
    with pytest.raises(UnsupportedModelError, match=message):
        find_layers(model)


def test_a_decoder_with_an_encoder_beside_is_refused() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=50, d_model=8, encoder_ffn_dim=12, decoder_ffn_dim=12, **sizes)
    with pytest.raises(UnsupportedModelError, match="or it has an encoder beside"):
        find_layers(BartForConditionalGeneration(config))


@pytest.mark.parametrize("config", [lora(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")], ids=type)
@pytest.mark.parametrize("layer_idx", [1, -1])
def test_hidden_states_are_kept_by_the_plain_formula(
    forget: Dataset,
    retain: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    layer_idx: int,
    config: PeftConfig,
) -> None:
    args = make_args(
        output_dir=str(tmp_path), forget_weight=0, retain_loss="embed_diff", retain_weight=7, rmu_layer=layer_idx
    )
    trainer = UnlearningTrainer(
        make_model(),
        args,
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        peft_config=config,
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])
    total, count = 0.0, 0
    for ids, labels in zip(batch["retain"]["input_ids"], batch["retain"]["labels"], strict=True):
        new, old = (after(model, layer_idx % LAYERS, ids) for model in (trainer.model, make_model()))
        new = new[-len(ids) :]  # tokens of prompt tuning come first
        for t in range(1, len(ids)):
            if labels[t] != -100:
                total += float((new[t - 1] - old[t - 1]).square().sum()) / HIDDEN
                count += 1
    assert total > 0
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(7 * total / count, rel=1e-4)


def test_all_parameters_are_held_to_what_the_model_was(
    forget: Dataset, retain: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = UnlearningTrainer(
        make_model(),
        make_args(output_dir=str(tmp_path), forget_loss="rmu", retain_loss="embed_diff", rmu_layer=-1, max_steps=3),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
    )
    trainer.train()
    kept = [entry["loss_retain"] for entry in trainer.state.log_history if "loss_retain" in entry]
    assert kept[0] == pytest.approx(0, abs=1e-9) and kept[-1] > 1e-6


@torch.no_grad()
def after(model: Any, layer_idx: int, ids: Tensor) -> Tensor:
    """What a decoder layer returns, read with a hook. Shape `(S, H)`."""
    (layer,) = (m for name, m in model.named_modules() if name.endswith(f"model.layers.{layer_idx}"))
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(input_ids=ids[None])
    handle.remove()
    return seen[0][0]


def test_lora_in_upper_layers_starts_there(
    forget: Dataset, retain: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    deltas = []
    for prefix_cache in (True, False):
        torch.manual_seed(5)
        trainer = UnlearningTrainer(
            make_model(),
            make_args(output_dir=str(tmp_path), forget_loss="npo", prefix_cache=prefix_cache, max_steps=3),
            train_dataset=forget,
            retain_dataset=retain,
            processing_class=tokenizer,
            peft_config=lora(layers_to_transform=[2]),
        )
        trainer.train()
        deltas.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    for cached, whole in zip(*deltas, strict=True):
        assert cached.abs().max() > 0
        torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-6)
