"""Train an adapter that forgets a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoTokenizer

from uoe_peft.cli.loading import load_model, load_rows
from uoe_peft.cli.parsing import parse
from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.tuner import UOEConfig


@dataclass
class UnlearnArguments:
    """Which model, which sets, which experts; the options of the training itself are those of `UnlearningConfig`."""

    model_name_or_path: str = field(metadata={"help": "A Mixture-of-Experts model: folder, or name on the Hub."})
    forget_dataset: str = field(metadata={"help": "File, folder, or name on the Hub, as in locuslab/TOFU:forget10."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise; any retain loss needs it."})
    dataset_split: str = field(default="train", metadata={"help": "Split of sets on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, bfloat16, float16 or float32."})
    device_map: str | None = field(default=None, metadata={"help": "Where the model goes, for example auto."})
    dequantize: bool = field(default=False, metadata={"help": "For weights that are stored in mxfp4 or FP8."})
    stream: bool = field(default=False, metadata={"help": "Read the model from disk layer by layer: for any size."})
    target_experts: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "Pairs layer:expert, as in 20:37 20:5; or auto, which attributes on the forget set first."},
    )
    delta_type: str = field(default="full", metadata={"help": "full or low_rank."})
    r: int = field(default=16, metadata={"help": "Rank of a low-rank delta."})
    uoe_alpha: float = field(default=32, metadata={"help": "Scale of a low-rank delta: uoe_alpha / r."})
    train_router: bool = field(default=True, metadata={"help": "Whether the routers of the target layers are trained."})


def run(arguments: Sequence[str]) -> None:
    """Train and write the adapter to `--output_dir`."""
    options, training = parse("unlearn", arguments, UnlearnArguments, UnlearningConfig)
    retain = options.retain_dataset and load_rows(options.retain_dataset, split=options.dataset_split)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    trainer = UnlearningTrainer(
        model=load_model(
            options.model_name_or_path,
            dtype=options.dtype,
            device_map=options.device_map,
            dequantize=options.dequantize,
            stream=options.stream,
        ),
        args=training,
        train_dataset=load_rows(options.forget_dataset, split=options.dataset_split),
        retain_dataset=retain,
        processing_class=tokenizer,
        peft_config=UOEConfig(
            target_experts=target_experts(options.target_experts),
            delta_type=options.delta_type,
            r=options.r,
            uoe_alpha=options.uoe_alpha,
            train_router=options.train_router,
        ),
    )
    trainer.train()
    trainer.save_model(training.output_dir)
    print(f"adapter written to {training.output_dir}; load it with `import uoe_peft` and PeftModel.from_pretrained")


def target_experts(words: Sequence[str]) -> str | list[tuple[int, int]]:
    """`"auto"`, or the pairs that words such as `"20:37"` name.

    Raises:
        ValueError: A word is no pair.
    """
    if list(words) == ["auto"]:
        return "auto"
    pairs = []
    for word in words:
        layer_idx, separator, expert_idx = word.partition(":")
        if not (separator and layer_idx.isdigit() and expert_idx.isdigit()):
            raise ValueError(f"target_experts must be pairs layer:expert such as 20:37, or auto, got {word!r}")
        pairs.append((int(layer_idx), int(expert_idx)))
    return pairs
