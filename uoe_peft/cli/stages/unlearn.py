"""Train an adapter that forgets a set."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

from uoe_peft.cli.loading import load_model, load_set, load_tokenizer
from uoe_peft.cli.options import ColumnOptions, ModelOptions, OverwriteOption
from uoe_peft.cli.outputs import check_folder
from uoe_peft.cli.parsing import parse
from uoe_peft.cli.picture import draw_training
from uoe_peft.cli.stopping import StopAfterStep
from uoe_peft.export import describe_adapter
from uoe_peft.requests.split import places_by_value
from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.training.model_card import record_training
from uoe_peft.training.objective.anchor import trained_configs
from uoe_peft.tuner import UOEConfig

_NO_FOLDER = "trainer_output"  # what transformers writes to where nothing is said
_WEIGHTS, _PICTURE = "adapter_model.safetensors", "training.png"


@dataclass(kw_only=True)
class UnlearnArguments(ModelOptions, ColumnOptions, OverwriteOption):
    """Which model, which sets, which experts; the options of the training itself are those of `UnlearningConfig`."""

    forget_dataset: str = field(metadata={"help": "File, folder, or name on the Hub, as in locuslab/TOFU:forget10."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise; any retain loss needs it."})
    split_column: str | None = field(
        default=None,
        metadata={"help": "Column of the forget set, renamed ones by their new name: forget one of its values."},
    )
    split_value: str | None = field(default=None, metadata={"help": "Which; the others have adapters of their own."})
    target_experts: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "Pairs layer:expert, as in 20:37 20:5; or auto, which attributes on the forget set first."},
    )
    delta_type: str = field(default="full", metadata={"help": "full or low_rank."})
    r: int = field(default=16, metadata={"help": "Rank of a low-rank delta."})
    uoe_alpha: float = field(default=32, metadata={"help": "Scale of a low-rank delta: uoe_alpha / r."})
    train_router: bool = field(default=True, metadata={"help": "Whether the routers of the target layers are trained."})
    compare_examples: int = field(
        default=32, metadata={"help": "Rows of each set for the table of before and after; 0: no table."}
    )


def run(arguments: Sequence[str]) -> None:
    """Train and write the adapter to `--output_dir`."""
    options, training = parse("unlearn", arguments, UnlearnArguments, UnlearningConfig)
    trainer = _trainer(options, training)
    stopping = StopAfterStep()
    trainer.add_callback(stopping)
    # The trainer's evaluation takes the LM head's weights themselves, which a streamed model does not hold.
    compared = 0 if options.stream else options.compare_examples
    before = _scores(trainer, compared)
    try:
        with stopping.listening():
            trainer.train(resume_from_checkpoint=_resumed(training.resume_from_checkpoint))
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_how_to_go_on(str(training.output_dir), arguments)) from interrupt
    after = _scores(trainer, compared)
    _record(trainer, before, after)
    trainer.save_model(training.output_dir)
    _say(trainer, before, after)
    if options.stream:
        print("no table of before and after of a streamed model; uoe-peft evaluate --stream true has one")


def _trainer(options: UnlearnArguments, training: UnlearningConfig) -> UnlearningTrainer:
    """The trainer, after everything that can be checked without a model was checked."""
    if training.output_dir == _NO_FOLDER:
        raise ValueError("unlearn needs --output_dir, the folder for the adapter")
    if options.compare_examples < 0:
        raise ValueError(f"--compare_examples must be at least 0, got {options.compare_examples}")
    goes_on = _resumed(training.resume_from_checkpoint) is not None
    _check_resumed(training)
    check_folder(
        str(training.output_dir),
        overwrite=options.overwrite or goes_on,
        option="output_dir",
        own=("adapter_config.json", "config.json"),
    )
    config = UOEConfig(
        target_experts=target_experts(options.target_experts),
        delta_type=options.delta_type,
        r=options.r,
        uoe_alpha=options.uoe_alpha,
        train_router=options.train_router,
    )
    forget = _split(load_set(options.forget_dataset, options), options)
    retain = load_set(options.retain_dataset, options) if options.retain_dataset else None
    return UnlearningTrainer(
        model=load_model(
            options.model_name_or_path,
            dtype=options.dtype,
            device_map=options.device_map,
            dequantize=options.dequantize,
            stream=options.stream,
        ),
        args=training,
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=load_tokenizer(options.model_name_or_path),
        peft_config=config,
    )


def _split(forget: Dataset, options: UnlearnArguments) -> Dataset:
    """The rows of one value of a column, or all."""
    if options.split_column is None:
        if options.split_value is not None:
            raise ValueError("--split_value needs --split_column, the column that it is a value of")
        return forget
    places = places_by_value(forget, options.split_column)
    value = options.split_value if options.split_value is None else str(options.split_value)  # YAML reads numbers
    if value not in places:
        known = ", ".join([*map(repr, [*places][:10]), *([f"and {len(places) - 10} more"] if len(places) > 10 else [])])
        raise ValueError(
            f"--split_value must be one of the values of {options.split_column!r}, {known}, got {value!r}; each is "
            "trained by a command of its own (in YAML, quote a value such as no or true)"
        )
    return forget.select(places[value])


def _how_to_go_on(output_dir: str, arguments: Sequence[str]) -> str:
    checkpoint = get_last_checkpoint(output_dir)
    if checkpoint is None:
        return "There is no checkpoint to go on from"
    words = [*arguments, "--resume_from_checkpoint", "true"]
    return f"A checkpoint is in {checkpoint}; to go on: {shlex.join(['uoe-peft', 'unlearn', *words])}"


def _resumed(word: str | None) -> str | bool | None:
    """A folder, True for the last checkpoint, None for a fresh start."""
    known: Mapping[str | None, bool | None] = {"true": True, "True": True, "false": None, "False": None}
    return known.get(word, word)


def _check_resumed(training: UnlearningConfig) -> None:
    word = _resumed(training.resume_from_checkpoint)
    if word is None:
        return
    place = str(training.output_dir) if word is True else str(word)
    found = place if word is not True else get_last_checkpoint(place) if Path(place).is_dir() else None
    if found is None or not (Path(found) / "trainer_state.json").is_file():
        raise ValueError(f"there is no checkpoint in {place} to go on from; leave out --resume_from_checkpoint")


def _scores(trainer: UnlearningTrainer, num_examples: int) -> dict[str, dict[str, float]]:
    """Likelihood and token accuracy on the first rows of each set that training reads."""
    scores = {}
    for role, rows in trainer.train_dataset.sets.items() if num_examples else ():
        few: Any = rows.select(range(min(num_examples, len(rows))))
        found = trainer.evaluate(few, metric_key_prefix=role)
        scores[role] = {"loss": found[f"{role}_loss"], "accuracy": found["eval_mean_token_accuracy"]}
    return scores


def _record(
    trainer: UnlearningTrainer, before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw the training, and give the model card its figures; before the model is saved, and its card with it."""
    figures = {
        f"{role}_{metric}_{when}": round(scores[role][metric], 4)
        for role in before
        for metric in ("loss", "accuracy")
        for when, scores in (("before", before), ("after", after))
    }
    draw_training(Path(str(trainer.args.output_dir)) / _PICTURE, trainer.state.log_history)
    record_training(trained_configs(trainer.model), trainer.args, figures=figures)


def _say(
    trainer: UnlearningTrainer, before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> None:
    folder = Path(str(trainer.args.output_dir))
    description = describe_adapter(str(folder))
    print(description.summary())
    print(f"target experts: {_reason(description.attribution)}")
    if trainer.strength_choice is not None:
        print(trainer.strength_choice.summary())
    for role in before:
        for metric, unit in (("loss", "nats a token"), ("accuracy", "of the tokens")):
            print(f"{role:8} {metric:9} {before[role][metric]:7.3f} -> {after[role][metric]:7.3f} {unit}")
    picture = f"; picture: {folder / _PICTURE}" if (folder / _PICTURE).is_file() else ""
    print(f"adapter: {folder / _WEIGHTS}, {(folder / _WEIGHTS).stat().st_size / 1e6:.2f} MB{picture}")
    print("load it with `import uoe_peft` and PeftModel.from_pretrained; ask it more with uoe-peft evaluate")


def _reason(attribution: Mapping[str, Any] | None) -> str:
    """Why these experts, in a line."""
    if attribution is None:
        return "as --target_experts names them"
    score, forget, sure = (attribution.get(key) or {} for key in ("score", "forget", "confidence"))
    chosen = f"highest score {score!r} on {forget.get('num_tokens', '?')} tokens of the forget set"
    if "margin" not in sure:
        return chosen
    return (
        f"{chosen}; {sure['margin']:.4f} above the next ({sure['margin_low']:.4f} to {sure['margin_high']:.4f}), first "
        f"in {sure['stability']:.0%} of resamples"
    )


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
