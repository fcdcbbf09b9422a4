"""Rank the experts of a model by how much they serve a forget set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from uoe_peft.attribution import ExpertAttribution, attribute_experts
from uoe_peft.attribution.summary import GENERALIST_LIFT
from uoe_peft.cli.loading import load_model, load_set, load_tokenizer
from uoe_peft.cli.options import ColumnOptions, ModelOptions, OverwriteOption
from uoe_peft.cli.outputs import check_file
from uoe_peft.cli.parsing import parse


@dataclass(kw_only=True)
class AttributeArguments(ModelOptions, ColumnOptions, OverwriteOption):
    """Which model, which sets, which score."""

    forget_dataset: str = field(metadata={"help": "File, folder, or name on the Hub, as in locuslab/TOFU:forget10."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise; the score 'contrast' needs it."})
    score: str = field(
        default="gate", metadata={"help": "How experts are ranked: gate, token_ratio, contrast, random."}
    )
    gate: str = field(
        default="softmax", metadata={"help": "softmax: Eq. 2 of the paper; applied: the layer's weights."}
    )
    max_tokens: int = field(default=100_000, metadata={"help": "Tokens to read."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a forward pass."})
    max_length: int = field(default=512, metadata={"help": "Longest sequence in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the sample."})
    top: int = field(default=5, metadata={"help": "Experts to print."})
    output: str = field(default="attribution.json", metadata={"help": "File for the result."})
    plot: str | None = field(default=None, metadata={"help": "File for a heat map."})


def run(arguments: Sequence[str]) -> None:
    """Print the best experts and write the attribution."""
    (options,) = parse("attribute", arguments, AttributeArguments)
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, got {options.top}")
    check_file(options.output, overwrite=options.overwrite, option="output")
    check_file(options.plot, overwrite=options.overwrite, option="plot")
    forget = load_set(options.forget_dataset, options)
    retain = options.retain_dataset and load_set(options.retain_dataset, options)
    model = load_model(
        options.model_name_or_path,
        dtype=options.dtype,
        device_map=options.device_map,
        dequantize=options.dequantize,
        stream=options.stream,
    )
    attribution = attribute_experts(
        model.eval(),
        forget,
        processing_class=load_tokenizer(options.model_name_or_path),
        score=options.score,
        gate=options.gate,
        retain_dataset=retain,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
    )
    print(attribution.summary(num_experts=options.top))
    print(_advice(attribution))
    attribution.save(options.output)
    if options.plot:
        attribution.plot(options.plot)
    print(f"written to {options.output}; in Python: ExpertAttribution.load({options.output!r}).top(1)")
    print(f"next: uoe-peft unlearn --target_experts {':'.join(map(str, attribution.top(1)[0]))}")


def _advice(attribution: ExpertAttribution) -> str:
    """Which score to trust, from what was measured."""
    lift = attribution.lift(attribution.top(1)[0])
    if lift is None:
        return "advice: without --retain_dataset nothing tells a specialist from an expert that is busy on any text"
    if attribution.score == "gate" and lift < GENERALIST_LIFT:
        return "advice: the best expert is busy on any text; trust --score contrast, which subtracts the retain set"
    return "advice: gate and contrast agree where lift is high; where they do not, trust contrast"
