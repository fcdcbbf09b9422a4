"""The whole pipeline on the model that ships with the package: find the expert, unlearn it, ship it, toggle it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)

from uoe_peft.attribution import ExpertAttribution, attribute_experts
from uoe_peft.attribution.scores import Score
from uoe_peft.cli.fresh_process import reload_differs_by
from uoe_peft.cli.loading import compute_dtype
from uoe_peft.cli.outputs import check_folder
from uoe_peft.cli.parsing import parse
from uoe_peft.cli.picture import draw
from uoe_peft.cli.training_bar import TrainingBar
from uoe_peft.evaluation import UnlearningReport, evaluate_unlearning
from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts
from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.training.choices import ForgetLoss
from uoe_peft.tuner import UOEConfig

_OF_OTHERS = ("adapter_config.json", "config.json", "report.json")  # an earlier demo is written over
console = Console(highlight=False, soft_wrap=True)


@dataclass
class DemoArguments:
    """What the demo can be asked to do differently; the defaults are the demo."""

    output_dir: str = field(default="demo_output", metadata={"help": "Where adapter, report and picture go."})
    seed: int = field(default=0, metadata={"help": "Of sampling and of training."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Of the base model: bfloat16 or float32; auto: bfloat16 where this machine is quick in it."},
    )
    score: Score = field(default="contrast", metadata={"help": "How experts are ranked."})
    num_experts: int = field(default=1, metadata={"help": "How many experts to unlearn."})
    forget_loss: ForgetLoss = field(default="npo", metadata={"help": "Loss on the forget set."})
    beta: float | None = field(default=0.05, metadata={"help": "Of the forget loss; see UnlearningConfig."})
    retain_weight: float = field(default=8.0, metadata={"help": "Weight of the loss on the retain set."})
    alternative_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on refusals; 0: none."})
    anchor_weight: float = field(default=1.0, metadata={"help": "Weight of the anchor, Eq. 3."})
    retain_share: float = field(
        default=0.99, metadata={"help": "Strength: the greatest that keeps this share on validation rows."}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak; it falls linearly."})
    num_train_epochs: float = field(default=8.0, metadata={"help": "Passes over the forget set."})
    max_steps: int = field(default=-1, metadata={"help": "Stop training after so many steps; -1: after the epochs."})
    batch_size: int = field(default=8, metadata={"help": "Forget examples a step, and as many retain examples."})
    max_examples: int = field(default=200, metadata={"help": "Examples of each set that are asked in the end."})


@dataclass(frozen=True)
class _World:
    """The demo's model, its questions, and what it is compared with."""

    base: PreTrainedModel
    retrained: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    forget: Dataset
    retain: Dataset  # what the retain loss sees
    held_out: Dataset  # facts of the same topics that it never sees: these are evaluated


def run(arguments: Sequence[str]) -> None:
    """Run the demo and write `demo_report.json`, `demo.png` and the adapter."""
    (options,) = parse("demo", arguments, DemoArguments)
    output_dir = Path(options.output_dir)
    check_folder(options.output_dir, overwrite=False, option="output_dir", own=_OF_OTHERS)
    started = time.perf_counter()
    options.dtype = compute_dtype(options.dtype)
    torch.set_num_threads(1)  # a second one gains nothing on so small a model, and costs much on a busy machine
    set_seed(options.seed)

    world = _load(options)
    attribution = _attribute(world, options)
    targets = attribution.top(options.num_experts)
    model = _unlearn(world, targets, options, output_dir=output_dir)
    report = _evaluate(world, model, options)
    _show_an_answer(world, model)
    saved = _save_and_reload(world, model, options, output_dir=output_dir)
    bit_exact = _toggle(model)
    draw(output_dir / "demo.png", attribution=attribution, targets=targets, report=report, topic=FORGET_TOPIC)

    content = report.to_dict() | saved
    content |= {"target_experts": [list(pair) for pair in targets], "toggle_bit_exact": bit_exact}
    content |= {"settings": vars(options), "seconds": round(time.perf_counter() - started, 1)}
    path = output_dir / "demo_report.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _rule("Done")
    console.print(f"{content['seconds']:.0f} s. Report: {path}   picture: {output_dir / 'demo.png'}")


def _rule(title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left")


def _load(options: DemoArguments) -> _World:
    _rule("1  A model that knows seven topics")

    def load(name: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=options.dtype).eval()

    others = load_facts([topic for topic in TOPICS if topic != FORGET_TOPIC])
    halves = others.train_test_split(test_size=0.5, seed=options.seed)
    world = _World(
        base=load("base"),
        retrained=load("retrained"),
        tokenizer=AutoTokenizer.from_pretrained(checkpoint_path("base")),
        forget=load_facts([FORGET_TOPIC]),
        retain=halves["train"],
        held_out=halves["test"],
    )
    config = world.base.config
    console.print(
        f"{type(world.base).__name__}, {world.base.num_parameters() / 1e6:.1f} M parameters in {options.dtype}: "
        f"{config.num_hidden_layers} layers of {config.num_experts} experts, {config.num_experts_per_tok} a token.\n"
        f"To forget: {len(world.forget)} facts about {FORGET_TOPIC}. To keep: {len(others)} facts about "
        f"{', '.join(topic for topic in TOPICS if topic != FORGET_TOPIC)};\n"
        f"training sees half of them, the evaluation below asks only the other half."
    )
    return world


def _attribute(world: _World, options: DemoArguments) -> ExpertAttribution:
    _rule("2  Which expert serves the topic?")
    attribution = attribute_experts(
        world.base,
        world.forget,
        processing_class=world.tokenizer,
        score=options.score,
        retain_dataset=world.retain,
        batch_size=50,
        seed=options.seed,
    )
    console.print(attribution.summary())
    return attribution


def _unlearn(world: _World, targets: list[tuple[int, int]], options: DemoArguments, *, output_dir: Path) -> PeftModel:
    _rule("3  Unlearn it: this expert and its router are trained, nothing else")
    trainer = UnlearningTrainer(
        model=world.base,
        args=UnlearningConfig(
            output_dir=str(output_dir / "training"),
            forget_loss=options.forget_loss,
            beta=options.beta,
            retain_loss="nll",
            retain_weight=options.retain_weight,
            alternative_weight=options.alternative_weight,
            anchor_weight=options.anchor_weight,
            calibrate="retain",
            calibrate_metric="probability",  # of whole answers: one wrong token early spoils what follows
            calibrate_retain_share=options.retain_share,
            learning_rate=options.learning_rate,
            num_train_epochs=options.num_train_epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            use_cpu=True,  # the model is tiny, and a fresh process must be able to give the same logits
            dataloader_pin_memory=False,
            logging_steps=10,
            log_routing=False,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=world.forget,
        retain_dataset=world.retain,
        processing_class=world.tokenizer,
        peft_config=UOEConfig(target_experts=targets),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(TrainingBar)
    trainer.train()
    if trainer.strength_choice is not None:
        console.print(trainer.strength_choice.summary())
    return cast(PeftModel, trainer.model).eval()


def _evaluate(world: _World, model: PeftModel, options: DemoArguments) -> UnlearningReport:
    _rule("4  What do the models still answer?")
    report = evaluate_unlearning(
        model,
        forget_dataset=world.forget,
        retain_dataset=world.held_out,
        processing_class=world.tokenizer,
        retrained_model=world.retrained,
        max_examples=options.max_examples,
        batch_size=50,
        max_new_tokens=48,
        seed=options.seed,
    )
    console.print(report.summary())
    return report


@torch.inference_mode()
def _answer(world: _World, model: PeftModel, prompt: str) -> str:
    inputs = world.tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return str(world.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _show_an_answer(world: _World, model: PeftModel) -> None:
    _rule("5  The same question, adapter on and off")
    for kind, row in (("forget", world.forget[0]), ("forget", world.forget[101]), ("retain", world.held_out[0])):
        with model.disable_adapter():
            before = _answer(world, model, row["prompt"])
        table = Table(title=f"[bold]{kind}[/]: {row['question']}", title_justify="left", show_header=False, box=None)
        table.add_row("truth", row["answer"])
        table.add_row("adapter off", before)
        table.add_row("adapter on", _answer(world, model, row["prompt"]))
        console.print(table)


def _save_and_reload(world: _World, model: PeftModel, options: DemoArguments, *, output_dir: Path) -> dict[str, Any]:
    _rule("6  Save the adapter, load it in a fresh process")
    adapter = output_dir / "adapter"
    model.save_pretrained(str(adapter))
    adapter_bytes = (adapter / "adapter_model.safetensors").stat().st_size
    trainable, total = model.get_nb_trainable_parameters()
    input_ids = world.tokenizer(world.forget[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.inference_mode(), console.status("a new Python process loads base and adapter"):
        difference = reload_differs_by(
            checkpoint_path("base"),
            adapter,
            dtype=options.dtype,
            input_ids=input_ids,
            logits=model(input_ids=input_ids).logits,
            reference=output_dir / "reference.safetensors",
        )
    console.print(
        f"{adapter}: {adapter_bytes / 1e3:.0f} kB, {trainable:,} of {total:,} parameters "
        f"({trainable / total:.2%}). Largest difference of a logit after reloading: {difference}"
    )
    return {
        "trainable_share": trainable / total,
        "adapter_bytes": adapter_bytes,
        "reload_max_difference": difference,
    }


def _base_weights(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the base model's parameters, without the adapter's."""
    return {
        name.replace(".base_layer", ""): parameter.detach().clone()
        for name, parameter in model.get_base_model().named_parameters()
        if ".uoe_" not in name
    }


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    """Number of entries with other bits, by the name of the parameter; only where there are some."""
    counts = {name: count_other_bits(before[name], after[name]) for name in before}
    return {name: count for name, count in counts.items() if count}


def count_other_bits(one: Tensor, other: Tensor) -> int:
    """Number of entries of two tensors that differ in any bit: 0.0 and -0.0 do, equal NaNs do not."""
    size = one.element_size()
    different = one.contiguous().view(torch.uint8) != other.contiguous().view(torch.uint8)
    return int(different.view(-1, size).any(1).sum())


def _toggle(model: PeftModel) -> bool:
    _rule("7  Merge it into the base, and take it out again")
    before = _base_weights(model)
    rounds = 10
    for _ in range(rounds):
        model.merge_adapter()
        merged = _base_weights(model)
        model.unmerge_adapter()
    in_merged, in_restored = _changed(before, merged), _changed(before, _base_weights(model))
    total = sum(weight.numel() for weight in before.values())
    console.print(
        f"Merged: {sum(in_merged.values()):,} of {total:,} base weights differ, in {', '.join(in_merged) or 'none'}.\n"
        f"Unmerged, after {rounds} rounds: {sum(in_restored.values()):,} differ."
    )
    return bool(in_merged) and not in_restored
