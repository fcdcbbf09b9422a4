"""Solve for an adapter that forgets a set, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from uoe_peft.cli.loading import load_model, load_set, load_tokenizer
from uoe_peft.cli.options import ColumnOptions, ModelOptions, OverwriteOption
from uoe_peft.cli.outputs import check_folder
from uoe_peft.cli.parsing import parse
from uoe_peft.cli.stages.unlearn import target_experts
from uoe_peft.export import describe_adapter
from uoe_peft.training.solve import solve_unlearning


@dataclass(kw_only=True)
class SolveArguments(ModelOptions, ColumnOptions, OverwriteOption):
    """Which model, which sets, which experts, and how far to go."""

    forget_dataset: str = field(metadata={"help": "File, folder, or name on the Hub, as in locuslab/TOFU:forget10."})
    retain_dataset: str = field(metadata={"help": "Likewise; what is to be kept."})
    output_dir: str = field(metadata={"help": "Folder for the adapter."})
    target_experts: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "Pairs layer:expert, as in 20:37 20:5; or auto, which attributes on the forget set first."},
    )
    target: str = field(
        default="direction", metadata={"help": "Where forget tokens' outputs go: direction, gradient or zero."}
    )
    coefficient: float = field(default=5.0, metadata={"help": "How far at most, in norms of these outputs."})
    retain_weight: float = field(default=3.0, metadata={"help": "How much more retain tokens count."})
    ridge: float = field(default=1e-3, metadata={"help": "Damping, as a share of the mean eigenvalue."})
    keep_retain: float = field(
        default=0.97, metadata={"help": "Share of the retain set's token accuracy that must be kept."}
    )
    max_tokens: int = field(default=100_000, metadata={"help": "Tokens of each set to read."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a forward pass."})
    max_length: int = field(default=512, metadata={"help": "Longest sequence in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the samples and of the direction."})


def run(arguments: Sequence[str]) -> None:
    """Solve and write the adapter."""
    (options,) = parse("solve", arguments, SolveArguments)
    check_folder(options.output_dir, overwrite=options.overwrite, option="output_dir", own=("adapter_config.json",))
    targets = target_experts(options.target_experts)
    forget, retain = (load_set(source, options) for source in (options.forget_dataset, options.retain_dataset))
    tokenizer = load_tokenizer(options.model_name_or_path)
    model = load_model(
        options.model_name_or_path,
        dtype=options.dtype,
        device_map=options.device_map,
        dequantize=options.dequantize,
        stream=options.stream,
    )
    solved = solve_unlearning(
        model.eval(),
        forget,
        retain,
        processing_class=tokenizer,
        target_experts=targets,
        target=options.target,
        coefficient=options.coefficient,
        retain_weight=options.retain_weight,
        ridge=options.ridge,
        keep_retain=options.keep_retain,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
    )
    solved.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    print(describe_adapter(options.output_dir).summary())
    print(f"adapter written to {options.output_dir}; load it with `import uoe_peft` and PeftModel.from_pretrained")
