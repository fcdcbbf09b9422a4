"""Plans against parameter counts that are worked out by hand."""

from __future__ import annotations

import pytest
from transformers import Qwen2MoeConfig

from uoe_peft.cli.planning import plan_unlearning

CONFIG = Qwen2MoeConfig(
    vocab_size=101,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=28,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=3,
    num_experts=6,
    num_experts_per_tok=2,
    tie_word_embeddings=False,
)


def test_one_expert_and_its_router_are_trained_and_idle_experts_cost_nothing() -> None:
    plan = plan_unlearning(CONFIG, layer_idx=3)
    expert = 3 * 24 * 20
    assert plan.trained_parameters == expert + 6 * 24
    assert plan.parameters - plan.active_parameters == 4 * 4 * expert + 101 * 24  # four idle of six, the embedding
    assert plan.step_share == 1 / 4
    assert plan.weights_gib * 2**30 == 2 * plan.parameters
    assert plan.training_gib * 2**30 == 16 * plan.trained_parameters


def test_time_follows_rows_and_speed() -> None:
    plan = plan_unlearning(CONFIG, layer_idx=3, rows=7, tokens_a_row=11, epochs=4, tflops=1e-6)
    assert plan.seconds == pytest.approx(2 * plan.active_parameters * 154 * (1 + 3 * 4 / 4) / 1e6)


def test_layers_without_experts_are_named() -> None:
    with pytest.raises(ValueError, match=r"layer 9 has no routed experts; use one of \[0, 1, 2, 3\]"):
        plan_unlearning(CONFIG, layer_idx=9)
