"""Rank the experts of a model by how much they serve a forget set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from uoe_peft.attribution import attribute_experts
from uoe_peft.cli.loading import load_model, load_rows
from uoe_peft.cli.parsing import parse


@dataclass
class AttributeArguments:
    """Which model, which sets, which score."""

    model_name_or_path: str = field(metadata={"help": "A Mixture-of-Experts model: folder, or name on the Hub."})
    forget_dataset: str = field(metadata={"help": "File, folder, or name on the Hub, as in locuslab/TOFU:forget10."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise; the score 'contrast' needs it."})
    dataset_split: str = field(default="train", metadata={"help": "Split of sets on the Hub."})
    dtype: str = field(default="auto", metadata={"help": "Of the model: auto, bfloat16, float16 or float32."})
    device_map: str | None = field(default=None, metadata={"help": "Where the model goes, for example auto."})
    dequantize: bool = field(default=False, metadata={"help": "For weights that are stored in mxfp4 or FP8."})
    stream: bool = field(default=False, metadata={"help": "Read the model from disk layer by layer: for any size."})
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
    model = load_model(
        options.model_name_or_path,
        dtype=options.dtype,
        device_map=options.device_map,
        dequantize=options.dequantize,
        stream=options.stream,
    )
    retain = options.retain_dataset and load_rows(options.retain_dataset, split=options.dataset_split)
    attribution = attribute_experts(
        model.eval(),
        load_rows(options.forget_dataset, split=options.dataset_split),
        processing_class=AutoTokenizer.from_pretrained(options.model_name_or_path),
        score=options.score,
        gate=options.gate,
        retain_dataset=retain,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
    )
    for layer_idx, expert_idx, affinity in attribution.ranking()[: options.top]:
        print(f"layer {layer_idx:3}  expert {expert_idx:3}  {affinity:.4f}")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    attribution.save(options.output)
    if options.plot:
        attribution.plot(options.plot)
    print(f"written to {options.output}; in Python: ExpertAttribution.load({options.output!r}).top(1)")
