"""What streaming takes for five published models, planned from their configurations; written into the guide.

Usage: `python -m benchmarks.published` (from the repository's root).
"""

from __future__ import annotations

from pathlib import Path

from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from uoe_peft.cli.planning import plan_streaming

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "streaming.md"
BEGIN, END = "<!-- planned by benchmarks/published.py -->\n", "<!-- end -->\n"

# Of what the plans assume: 400 forget and 400 retain rows, a processor's 16 cores, one NVMe disk.
ROWS, TOKENS_A_ROW, TFLOPS, DISK_GB_S = 400, 256, 1.0, 3.0


def published() -> dict[str, PreTrainedConfig]:
    """Configurations as their makers published them, what has no effect on sizes left out."""
    return {
        "gpt-oss-120b": GptOssConfig(
            vocab_size=201_088,
            hidden_size=2880,
            intermediate_size=2880,
            num_hidden_layers=36,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            num_local_experts=128,
            num_experts_per_tok=4,
            quantization_config={"quant_method": "mxfp4"},
        ),
        "Mixtral-8x22B": MixtralConfig(
            vocab_size=32_000,
            hidden_size=6144,
            intermediate_size=16_384,
            num_hidden_layers=56,
            num_attention_heads=48,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        "Qwen3-235B-A22B": Qwen3MoeConfig(
            vocab_size=151_936,
            hidden_size=4096,
            intermediate_size=12_288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
        ),
        "GLM-4.5": Glm4MoeConfig(
            vocab_size=151_552,
            hidden_size=5120,
            intermediate_size=12_288,
            moe_intermediate_size=1536,
            num_hidden_layers=92,
            num_attention_heads=96,
            num_key_value_heads=8,
            head_dim=128,
            n_routed_experts=160,
            n_shared_experts=1,
            num_experts_per_tok=8,
            first_k_dense_replace=3,
            attention_bias=True,
            use_qk_norm=True,
        ),
        "DeepSeek-V3": DeepseekV3Config(
            vocab_size=129_280,
            hidden_size=7168,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            first_k_dense_replace=3,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
        ),
    }


def table() -> str:
    """A row for each model, with memory for attribution and for training, in float32 and in bfloat16."""
    memory = ["Memory, float32", "Memory, bfloat16", "In blocks, float32"]
    columns = ["Model", "Parameters", "On disk", *memory, "Attribute", "Train"]
    lines = [f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"]
    for name, config in published().items():
        wide, narrow = (
            plan_streaming(
                config,
                rows=ROWS,
                tokens_a_row=TOKENS_A_ROW,
                tflops=TFLOPS,
                disk_gb_s=DISK_GB_S,
                weight_bytes=weight_bytes,
            )
            for weight_bytes in (4, 2)
        )
        lines.append(
            f"| {name} | {wide.parameters / 1e9:.0f} G | {wide.checkpoint_gb:.0f} GB | "
            f"{wide.attribute_gib:.0f} / {wide.train_gib:.0f} GiB | "
            f"{narrow.attribute_gib:.0f} / {narrow.train_gib:.0f} GiB | "
            f"{wide.blocks_attribute_gib:.0f} / {wide.blocks_train_gib:.0f} GiB | "
            f"{wide.attribute_seconds / 3600:.1f} h | "
            f"{wide.train_seconds / 3600:.1f} h |\n"
        )
    return "".join(lines)


def with_table(page: str) -> str:
    """The guide with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Write the table into the guide."""
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
