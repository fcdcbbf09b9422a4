"""Put the neurons of a dense model into groups, which the other stages then take for experts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uoe_peft.cli.loading import load_model, load_set, load_tokenizer
from uoe_peft.cli.options import ColumnOptions
from uoe_peft.cli.parsing import parse
from uoe_peft.dense import FILE, cluster_neurons, factorize
from uoe_peft.export.checkpoint import Checkpoint
from uoe_peft.export.output import appearing_at_once, check_vacant, check_writable
from uoe_peft.export.rewriting import copy_shards


@dataclass(kw_only=True)
class FactorizeArguments(ColumnOptions):
    """Which dense model, which calibration text, how many groups."""

    model_name_or_path: str = field(
        metadata={"help": "A dense model with gate, up and down projections: folder, or name on the Hub."}
    )
    dataset_name_or_path: str = field(
        metadata={"help": "Calibration text: file, folder, or name on the Hub. Best both kinds: to forget and to keep."}
    )
    output_dir: str = field(metadata={"help": "Folder to make: the checkpoint as it is, and the groups."})
    num_experts: int = field(default=8, metadata={"help": "Groups a layer; they must divide the neurons evenly."})
    dtype: str = field(default="auto", metadata={"help": "Of the measurement; the checkpoint keeps its own."})
    device_map: str | None = field(default=None, metadata={"help": "Where the model goes, for example auto."})
    link: bool = field(default=True, metadata={"help": "Hard-link the weights instead of copying them."})
    max_tokens: int = field(default=100_000, metadata={"help": "Tokens to read."})
    batch_size: int = field(default=8, metadata={"help": "Sequences a forward pass."})
    max_length: int = field(default=512, metadata={"help": "Longest sequence in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the order of the rows and of the clustering."})


def run(arguments: Sequence[str]) -> None:
    """Cluster the neurons and write the folder."""
    (options,) = parse("factorize", arguments, FactorizeArguments)
    output = Path(options.output_dir).absolute()
    check_vacant(output)
    check_writable(output.parent)
    text = load_set(options.dataset_name_or_path, options)
    checkpoint = Checkpoint.open(options.model_name_or_path)
    model = load_model(options.model_name_or_path, dtype=options.dtype, device_map=options.device_map).eval()
    groups = cluster_neurons(
        model,
        text,
        processing_class=load_tokenizer(options.model_name_or_path),
        num_groups=options.num_experts,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
    )
    factorize(model, groups)  # what cannot be done is said before anything is written
    sources = {shard: checkpoint.shard(shard).path for shard in checkpoint.shards}
    num_bytes = 0 if options.link else sum(path.stat().st_size for path in sources.values())
    with appearing_at_once(output, num_bytes=num_bytes) as folder:
        copy_shards(sources, {}, folder, link=options.link)
        for path in checkpoint.other_files[0]:
            shutil.copyfile(path, folder / path.name)
        groups.save(folder / FILE)
    sizes = sorted({len(own) // groups.num_groups for own in groups.by_layer.values()})
    print(f"{len(groups.by_layer)} layers, {groups.num_groups} groups of {', '.join(map(str, sizes))} neurons each")
    print(f"written to {output}; the checkpoint in it is the dense one, unchanged, with {FILE} beside it")
    print(f"next: uoe-peft attribute --model_name_or_path {options.output_dir} --score contrast")
