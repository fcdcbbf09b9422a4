"""Writes what `table3.py` needs for a ground of its own: base model, twin that never saw the forget rows, both sets.

    python benchmarks/grounds.py natural --data DIR --output_dir outputs/natural
    python benchmarks/grounds.py --data DIR --tau 0.6 --output_dir outputs/tofu_tau0.6
    python benchmarks/grounds.py --data DIR --gguf GGUF --text FILE --output_dir outputs/smollm
    python benchmarks/table3.py --model_name_or_path outputs/tofu_tau0.6/base \
        --retrained_model outputs/tofu_tau0.6/retrained --forget_dataset outputs/tofu_tau0.6/forget.jsonl \
        --retain_dataset outputs/tofu_tau0.6/retain.jsonl --output_dir outputs/table3_tofu_tau0.6

Natural domains (`natural.py`) are learned from scratch: MMLU, WikiText and TOFU together, of which MMLU's biology and
health are to be forgotten; DIR holds `mmlu`, `wikitext2` and `tofu`. The two models take about four CPU minutes, more
with more rows; called again, training goes on after its last pass. `natural_table3.py` is Table 3 for it.

In the other two DIR holds TOFU's `full.json`. A small model learns 50 authors from scratch, of whom the last 5 are to
be forgotten (`tofu_model.py`); or, with `--gguf`, a pretrained language model learns the last 8, of whom 2 are to be
forgotten (`smollm_moe.py`; GGUF holds SmolLM2-135M, FILE plain text that keeps its language, such as WikiText). The
twin learned the same rows but for theirs, in as many passes. The domain dial has nothing to act on then, so that one
twin serves every tau of the same `--cache_dir`. What is there already, base or twin, is not trained again.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from natural import NaturalArguments, natural
from smollm_moe import load_dense, teach, text_nll
from tofu_model import ROWS_AN_AUTHOR, load_tofu, tofu_model, train_tokenizer
from transformers import HfArgumentParser


@dataclass
class GroundArguments:
    """What is built, and where."""

    data: Path = field(metadata={"help": "Folder with TOFU's full.json."})
    output_dir: Path = field(default=Path("outputs/ground"), metadata={"help": "Where models and sets go."})
    cache_dir: Path = field(default=Path("outputs/tofu_models"), metadata={"help": "Small models, for all dials."})
    tau: float = field(default=0.6, metadata={"help": "Domain dial: how far an expert is made special; 0: not."})
    gguf: Path | None = field(default=None, metadata={"help": "Weights of SmolLM2-135M; None: a small model."})
    text: Path | None = field(default=None, metadata={"help": "Plain text, for --gguf."})
    num_authors: int = field(default=8, metadata={"help": "That --gguf learns: TOFU's last."})
    num_forget_authors: int = field(default=2, metadata={"help": "Of these, the last, which --gguf is to forget."})
    epochs: int = field(default=16, metadata={"help": "Passes of --gguf over the rows."})
    bf16: bool = field(default=False, metadata={"help": "Multiply in bfloat16 (--gguf), where that is fast."})


def main() -> None:
    """Train what is not there yet, and write the ground."""
    torch.set_num_threads(1)  # a second one gains little on so small a model, and costs much on a busy machine
    if sys.argv[1:2] == ["natural"]:
        natural(*HfArgumentParser(NaturalArguments).parse_args_into_dataclasses(sys.argv[2:]))
        return
    (args,) = HfArgumentParser(GroundArguments).parse_args_into_dataclasses()
    if args.gguf is None:
        small(args)
    elif args.text is None:
        raise ValueError("--gguf needs --text: a file of plain text, for which the model stays what it was")
    else:
        pretrained(args)


def small(args: GroundArguments) -> None:
    """TOFU's last 50 authors, learned from scratch."""
    tofu = load_tofu(args.data, seed=0)
    tokenizer = train_tokenizer(tofu.everything)
    kept = tofu.everything.select(range(len(tofu.everything) - len(tofu.forget)))
    write_sets(args.output_dir, {"forget": tofu.forget, "retain": kept})
    base = tofu_model(tofu.everything, tokenizer, args.cache_dir, tau=args.tau, num_forget=len(tofu.forget))
    write_model(args.output_dir / "base", base, tokenizer)
    retrained = tofu_model(kept, tokenizer, args.cache_dir / "retrained", tau=0.0, num_forget=0)
    write_model(args.output_dir / "retrained", retrained, tokenizer)


def pretrained(args: GroundArguments) -> None:
    """TOFU's last authors, learned by the routed experts of a pretrained model."""
    assert args.gguf is not None and args.text is not None
    everything = load_tofu(args.data, seed=0).everything
    last = args.num_authors * ROWS_AN_AUTHOR
    rows = everything.select(range(len(everything) - last, len(everything)))
    num_forget = args.num_forget_authors * ROWS_AN_AUTHOR
    kept, forget = rows.select(range(last - num_forget)), rows.select(range(last - num_forget, last))
    same_settings(args)
    write_sets(args.output_dir, {"forget": forget, "retain": kept})
    dense, tokenizer = load_dense(args.gguf)
    text = args.text.read_text(encoding="utf-8")
    learned, held_out = text[: len(text) // 2], text[len(text) // 2 :]
    print(f"dense: {text_nll(dense, tokenizer, held_out):.3f} nats a token of held-out text", flush=True)
    for name, seen, number in (("base", rows, num_forget), ("retrained", kept, 0)):
        if (args.output_dir / name / "tokenizer.json").exists():  # written last
            continue
        own = {"num_forget": number, "tau": args.tau, "epochs": args.epochs, "bf16": args.bf16, "name": name}
        model = teach(dense, tokenizer, seen, learned, **own)
        print(f"{name}: {text_nll(model, tokenizer, held_out):.3f}", flush=True)
        write_model(args.output_dir / name, model, tokenizer)


def same_settings(args: GroundArguments) -> None:
    """Write the settings that models and sets depend on; or refuse a folder with others, so that no ground mixes two.

    Raises:
        ValueError: What was begun in the folder learned something else, or nobody knows what.
    """
    names = ("num_authors", "num_forget_authors", "epochs", "tau", "bf16")
    settings = {name: getattr(args, name) for name in names}
    path = args.output_dir / "ground.json"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists() and any((args.output_dir / name).exists() for name in ("base", "retrained")):
        raise ValueError(f"{args.output_dir} has models, and no {path.name} says what they learned; choose another")
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != settings:
        raise ValueError(f"{args.output_dir} was begun with {before}, not {settings}; choose another --output_dir")


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_sets(folder: Path, sets: dict[str, Dataset]) -> None:
    """Save each set as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        rows.to_json(folder / f"{name}.jsonl")


if __name__ == "__main__":
    main()
