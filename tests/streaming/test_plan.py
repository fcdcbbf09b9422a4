"""What streaming takes, against sizes that are worked out by hand and those that the models' makers publish."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2MoeConfig

from benchmarks.published import GUIDE, published, with_table
from uoe_peft.cli import main
from uoe_peft.cli.planning import plan_streaming

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
EXPERT = 3 * 24 * 20
# Attention with three biases, experts, shared expert with its gate, router, two norms.
LAYER = 4 * 24 * 24 + 3 * 24 + 6 * EXPERT + 3 * 24 * 28 + 24 + 6 * 24 + 2 * 24
ACTIVE = LAYER - 4 * EXPERT

# In 10^9, as published: model cards and papers; GLM-4.5's 355 count a layer that predicts a further token.
PARAMETERS = {
    "gpt-oss-120b": 116.83,
    "Mixtral-8x22B": 140.6,
    "Qwen3-235B-A22B": 235.09,
    "GLM-4.5": 355.0,
    "DeepSeek-V3": 671.03,
}
GIGABYTES = {"gpt-oss-120b": 65.25, "Mixtral-8x22B": 281.2, "Qwen3-235B-A22B": 470.2}


def test_memory_is_a_layer_states_and_a_batch() -> None:
    plan = plan_streaming(CONFIG, layer_idx=3, rows=5, tokens_a_row=7)
    states = 2 * (2 * 5 * 7) * 24 * 4
    batch = 8 * 7 * (2 * (3 * 20 + 2 * 24) + 10 * 24) * 4
    assert plan.layer_gib * 2**30 == 4 * LAYER
    peak = 4 * LAYER + 2 * LAYER / 3 + states + batch
    assert plan.attribute_gib * 2**30 == pytest.approx(peak)
    assert plan.train_gib * 2**30 == pytest.approx(peak + 4 * LAYER + 16 * (EXPERT + 6 * 24))
    assert plan.ahead_gib * 2**30 == 2 * LAYER
    # All experts are one block here; what two of them put out waits, with what they got and what came before.
    others = LAYER - 6 * EXPERT
    in_blocks = 4 * others + 2 * others / 3 + states + batch + 4 * 6 * EXPERT + (2 + 2) * states / 2
    assert plan.blocks_attribute_gib * 2**30 == pytest.approx(in_blocks)
    kept = 4 * (LAYER - 5 * EXPERT)
    assert plan.blocks_train_gib * 2**30 == pytest.approx(in_blocks + kept + 16 * (EXPERT + 6 * 24))
    assert plan.parameters == 4 * LAYER + 2 * 101 * 24 + 24
    assert plan.checkpoint_gb * 1e9 == pytest.approx(2 * plan.parameters)
    assert plan.adapter_mib * 2**20 == 4 * (EXPERT + 6 * 24)


def test_time_is_that_of_the_slower_of_disk_and_processor() -> None:
    read = 2 * LAYER / 1e6
    slow_disk = plan_streaming(CONFIG, layer_idx=3, rows=5, tokens_a_row=7, disk_gb_s=1e-3, tflops=1e9)
    assert slow_disk.attribute_seconds == pytest.approx(4 * read)
    assert slow_disk.train_seconds == pytest.approx((4 + 2 * 1 + 3) * read)  # whole, twice from layer 3, up to it
    slow_cpu = plan_streaming(CONFIG, layer_idx=3, rows=5, tokens_a_row=7, disk_gb_s=1e9, tflops=1e-6, epochs=2)
    tokens = 2 * 5 * 7
    assert slow_cpu.attribute_seconds == pytest.approx(4 * 2 * ACTIVE * tokens / 1e6)
    multiplied = 6 * 2 * 7 + 3 * tokens + 3 * tokens * 2  # two rows in the checks, all below, three times in a step
    assert slow_cpu.train_seconds == pytest.approx(2 * ACTIVE * multiplied / 1e6)


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_published_models_have_their_published_sizes(name: str) -> None:
    plan = plan_streaming(published()[name])
    assert plan.parameters / 1e9 == pytest.approx(PARAMETERS[name], rel=0.01)
    if name in GIGABYTES:
        assert plan.checkpoint_gb == pytest.approx(GIGABYTES[name], rel=0.01)


def test_the_guide_has_the_plans_that_are_computed() -> None:
    page = GUIDE.read_text(encoding="utf-8")
    assert page == with_table(page), "run `python -m benchmarks.published`"


def test_planned_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path)
    options = ["plan", "--model_name_or_path", str(tmp_path), "--layer_idx", "2"]
    main([*options, "--stream", "true", "--disk_gb_s", "2", "--weight_bytes", "2"])
    said = capsys.readouterr().out
    assert said.strip() == plan_streaming(CONFIG, layer_idx=2, disk_gb_s=2, weight_bytes=2).summary()
    with pytest.raises(SystemExit):
        main([*options, "--disk_gb_s", "2"])
    assert "--disk_gb_s is for plans with --stream true" in capsys.readouterr().err


def test_layers_without_experts_are_named() -> None:
    with pytest.raises(ValueError, match=r"layer 9 has no routed experts; use one of \[0, 1, 2, 3\]"):
        plan_streaming(CONFIG, layer_idx=9)
