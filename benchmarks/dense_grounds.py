"""Writes what `dense.py` compares on: a dense model that answers its rows, and the rows to forget and to keep.

    python benchmarks/dense_grounds.py --output_dir outputs/dense_small
    python benchmarks/dense_grounds.py --output_dir outputs/dense_smollm --gguf GGUF --tofu DIR --text FILE [--bf16]
    python benchmarks/dense.py --ground outputs/dense_small

A small Llama (4 layers, hidden size 128, 512 neurons a layer) learns four of the testbed's topics from scratch, each
fact in the words in which it is asked; one topic is to be forgotten. Or the upper half of SmolLM2-135M, a pretrained
language model from a GGUF file, learn TOFU's last authors (DIR holds `full.json`), of whom the last ones are to be
forgotten. Half of FILE, plain text such as WikiText, is kept beside it: its likelihood tells what becomes of what the
model knew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from grounds import write_model, write_sets
from smollm_moe import answer_nll, load_dense, text_nll
from tofu_model import ROWS_AN_AUTHOR, adamw, load_tofu, set_rate, shuffled_batches
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

from uoe_peft.data import Batch, collate, tokenize_dataset
from uoe_peft.moe.segments import LayerState, find_layers, run_from_layer, run_until_layer
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

TEXT = "text.txt"


@dataclass
class DenseGroundArguments:
    """What is built, and where."""

    output_dir: Path = field(default=Path("outputs/dense_small"), metadata={"help": "Where model and sets go."})
    epochs: int | None = field(default=None, metadata={"help": "Passes over the rows; None: 40, pretrained 12."})
    gguf: Path | None = field(default=None, metadata={"help": "Weights of SmolLM2-135M; None: a small model."})
    tofu: Path | None = field(default=None, metadata={"help": "Folder with TOFU's full.json, for --gguf."})
    text: Path | None = field(default=None, metadata={"help": "Plain text, for --gguf."})
    authors: int = field(default=6, metadata={"help": "How many are learned, for --gguf."})
    forget_authors: int = field(default=2, metadata={"help": "How many of these are to be forgotten."})
    bf16: bool = field(default=False, metadata={"help": "Multiply in bfloat16, where that is fast."})


def main() -> None:
    """Teach the model, and write the ground."""
    (args,) = HfArgumentParser(DenseGroundArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    set_seed(0)
    if args.gguf is None:
        small(args)
    elif args.tofu is None or args.text is None:
        raise ValueError("--gguf needs --tofu, the rows that are learned, and --text, what is known besides")
    else:
        pretrained(args, args.gguf, args.tofu, args.text)


def small(args: DenseGroundArguments) -> None:
    """The testbed's facts, learned from scratch."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path("base"))
    kept = [topic for topic in TOPICS if topic != FORGET_TOPIC][:3]
    write_sets(args.output_dir, {"forget": load_facts([FORGET_TOPIC]), "retain": load_facts(kept)})
    model, rows = new_llama(tokenizer), load_facts([FORGET_TOPIC, *kept])
    learn(model, rows, tokenizer, epochs=args.epochs or 40, peak=3e-3)
    write_model(args.output_dir / "base", model, tokenizer)


def pretrained(args: DenseGroundArguments, gguf: Path, tofu: Path, text: Path) -> None:
    """TOFU's last authors, learned by all weights of a pretrained model."""
    everything = load_tofu(tofu, seed=0).everything
    first, middle = (len(everything) - count * ROWS_AN_AUTHOR for count in (args.authors, args.forget_authors))
    kept, forget = everything.select(range(first, middle)), everything.select(range(middle, len(everything)))
    write_sets(args.output_dir, {"forget": forget, "retain": kept})
    told = text.read_text(encoding="utf-8")
    (args.output_dir / TEXT).write_text(told[len(told) // 2 :], encoding="utf-8")
    model, tokenizer = load_dense(gguf)
    print(f"pretrained: {text_nll(model, tokenizer, told[len(told) // 2 :]):.3f} nats a token of text", flush=True)
    rows = everything.select(range(first, len(everything)))
    first = model.config.num_hidden_layers // 2
    learn_above(model, first, rows, tokenizer, epochs=args.epochs or 12, peak=5e-4, bf16=args.bf16)
    write_model(args.output_dir / "base", plain(model), tokenizer)


def new_llama(tokenizer: Any) -> LlamaForCausalLM:
    """Four layers of 512 neurons, from scratch."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def plain(model: Any) -> LlamaForCausalLM:
    """The same weights in a model that does not remember having been quantised."""
    config = LlamaConfig(**{k: v for k, v in model.config.to_diff_dict().items() if k != "quantization_config"})
    copied = LlamaForCausalLM(config)
    copied.load_state_dict(model.state_dict())
    return copied


def learn(model: Any, rows: Dataset, tokenizer: Any, *, epochs: int, peak: float) -> None:
    """All weights learn the answers of `rows`, eight at a step."""
    examples = tokenized(rows, tokenizer)
    steps = [
        collate(batch, pad_token_id=tokenizer.pad_token_id)
        for _ in range(epochs)
        for batch in shuffled_batches(examples, batch_size=8)
    ]
    train(model, ((lambda batch=batch: model(**batch).loss) for batch in steps), num_steps=len(steps), peak=peak)


def learn_above(
    model: Any, first_layer: int, rows: Dataset, tokenizer: Any, *, epochs: int, peak: float, bf16: bool
) -> None:
    """The layers from `first_layer` on learn the answers of `rows`, 16 at a step; what enters them is computed once."""
    layers, autocast = find_layers(model), partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
    model.requires_grad_(False)
    for layer in list(layers.children())[first_layer:]:
        layer.requires_grad_(True)
    lessons = []
    for examples in shuffled_batches(tokenized(rows, tokenizer), batch_size=16):
        batch = collate(examples, pad_token_id=tokenizer.pad_token_id)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), autocast():
            lessons.append((inputs, batch["labels"], run_until_layer(model, first_layer, inputs)))

    def loss(inputs: Batch, labels: Tensor, state: LayerState) -> Tensor:
        # Without the cache of casts, which would keep the weights of the first step.
        with autocast(cache_enabled=False), run_from_layer(layers, first_layer, state):
            return answer_nll(model, model.model(**inputs, use_cache=False).last_hidden_state, labels)

    order = [place for _ in range(epochs) for place in torch.randperm(len(lessons)).tolist()]
    train(model, (partial(loss, *lessons[place]) for place in order), num_steps=len(order), peak=peak)
    model.requires_grad_(True)


def tokenized(rows: Dataset, tokenizer: Any) -> list[Any]:
    """Prompts and answers as token ids and labels."""
    pairs = rows.select_columns(["prompt", "completion"])
    return [dict(row) for row in tokenize_dataset(pairs, tokenizer, max_length=None, name="rows")]


def train(model: Any, losses: Iterable[Callable[[], Tensor]], *, num_steps: int, peak: float) -> None:
    """A step down each loss."""
    optimizer = adamw(model.train())
    for step, loss in enumerate(bar := tqdm(losses, total=num_steps, desc="learning", unit="step", mininterval=10)):
        set_rate(optimizer, step, num_steps, peak=peak)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{value.item():.2f}", refresh=False)
    model.eval()


if __name__ == "__main__":
    main()
