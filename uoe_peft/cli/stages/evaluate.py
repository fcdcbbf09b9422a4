"""What an adapter has made a model forget, and what it cost: a report as JSON, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from uoe_peft.cli.loading import load_model, load_set, load_tokenizer
from uoe_peft.cli.options import ColumnOptions, OverwriteOption
from uoe_peft.cli.outputs import check_apart, check_folder
from uoe_peft.cli.parsing import parse, read_options
from uoe_peft.evaluation import (
    QuestionSet,
    Suite,
    SuiteScore,
    calibrate_scale,
    evaluate_unlearning,
    load_option_files,
    option_set,
    plain_suite,
    testbed_suite,
    tofu_suite,
)
from uoe_peft.evaluation.attacking import Attack
from uoe_peft.evaluation.attacks import AttackName, run_attack
from uoe_peft.evaluation.suites.suite import OTHER_PROMPT
from uoe_peft.export.saved_adapter import read_config

ATTACKS: tuple[str, ...] = get_args(AttackName)


@dataclass(kw_only=True)
class EvaluateArguments(ColumnOptions, OverwriteOption):
    """Which adapter, which questions."""

    adapter: str | None = field(default=None, metadata={"help": "Folder of the adapter, or its name on the Hub."})
    unlearned_model: str | None = field(
        default=None, metadata={"help": "In place of an adapter: a model trained in full, beside --model_name_or_path."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "The base model; None: the adapter's own."})
    suite: str = field(
        default="plain", metadata={"help": "plain (--forget_dataset, --retain_dataset), tofu (--tofu), or testbed."}
    )
    forget_dataset: str | None = field(default=None, metadata={"help": "File, folder, or name on the Hub."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise."})
    holdout_dataset: str | None = field(
        default=None, metadata={"help": "Likewise: rows of the forget set's kind that no model was taught."}
    )
    by: list[str] = field(default_factory=list, metadata={"help": "Columns with scores for each of their values."})
    tofu: str | None = field(default=None, metadata={"help": "Folder with TOFU's ..._perturbed.json files."})
    tofu_split: str = field(default="forget10", metadata={"help": "forget01, forget05 or forget10."})
    mmlu: str | None = field(default=None, metadata={"help": "Folder with MMLU's CSV files, as a further retain set."})
    retrained_model: str | None = field(default=None, metadata={"help": "A model that never saw the forget set."})
    attacks: list[str] = field(
        default_factory=list, metadata={"help": "By name, such as relearning int4; a name that is none lists them all."}
    )
    attack_options: str | None = field(
        default=None, metadata={"help": "YAML file with the options of attacks: {relearning: {learning_rate: 1e-4}}."}
    )
    attack_examples: int = field(default=40, metadata={"help": "Rows of each set that attacks are scored on."})
    attack_rows: int = field(
        default=40,
        metadata={"help": "Rows of the forget set that relearning, soft_prompt, gcg and few_shot use; not evaluated."},
    )
    relearning_datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=FILE of further sets to relearn on, such as other facts of the same subjects."},
    )
    retain_share: float | None = field(
        default=None, metadata={"help": "Find the greatest scale of the adapter that keeps this share, such as 0.95."}
    )
    forget_limit: float | None = field(
        default=None, metadata={"help": "Or the least scale that brings the forget set down to this score."}
    )
    validation_examples: int = field(
        default=40, metadata={"help": "Rows of each set that choose the scale; the rest are evaluated."}
    )
    max_examples: int | None = field(default=None, metadata={"help": "Rows of each set; None for all."})
    batch_size: int = field(default=16, metadata={"help": "Rows a forward pass."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence in tokens."})
    max_new_tokens: int = field(default=128, metadata={"help": "Where an answer is cut."})
    dtype: str = field(default="auto", metadata={"help": "Of the models: auto, bfloat16, float16 or float32."})
    device_map: str | None = field(default=None, metadata={"help": "Where the models go, for example auto."})
    stream: bool = field(
        default=False, metadata={"help": "Read the model from disk layer by layer: by likelihood alone, no attacks."}
    )
    seed: int = field(default=0, metadata={"help": "Of the draws."})
    output_dir: str = field(default="evaluation", metadata={"help": "Where the report goes, and answers so far."})
    title: str = field(default="Unlearning report", metadata={"help": "Of the page."})


def run(arguments: Sequence[str]) -> None:
    """Evaluate, print the table and write the report to `--output_dir`; answers so far are kept there, too."""
    (options,) = parse("evaluate", arguments, EvaluateArguments)
    check_apart(options.output_dir, adapter=options.adapter)
    check_folder(options.output_dir, overwrite=options.overwrite, option="output_dir", own=("report.json",))
    name = base_of(options)
    suite = suite_of(options)
    check_options(options)
    tokenizer = load_tokenizer(name)
    load = partial(load_model, dtype=options.dtype, device_map=options.device_map, stream=options.stream)
    base = load(name).eval()
    model = PeftModel.from_pretrained(base, options.adapter).eval() if options.adapter else None
    trained_in_full = None if model else load(cast(str, options.unlearned_model)).eval()
    asked = {"batch_size": options.batch_size, "max_length": options.max_length, "seed": options.seed}
    asked["max_new_tokens"] = options.max_new_tokens
    attacks, suite = attacks_of(options, suite, tokenizer, base=None if model else base)
    calibration = None
    if options.retain_share is not None or options.forget_limit is not None:
        assert model is not None  # `check_options` has seen to it
        validation, suite = split_off(suite, options.validation_examples, seed=options.seed)
        calibration = calibrate_scale(
            model,
            SuiteScore(Suite("validation", validation), tokenizer, **asked),
            retain_share=options.retain_share,
            forget_limit=options.forget_limit,
        )
    report = evaluate_unlearning(
        model or cast(PreTrainedModel, trained_in_full),
        suite,
        processing_class=tokenizer,
        base_model=None if model else base,
        retrained_model=load(options.retrained_model).eval() if options.retrained_model else None,
        attacks=attacks,
        attack_examples=options.attack_examples,
        calibration=calibration,
        max_examples=options.max_examples,
        cache_dir=Path(options.output_dir) / "answers",
        **asked,
    )
    print(report.summary())
    files = report.write(options.output_dir, title=options.title)
    print(f"written: {', '.join(map(str, files))}")


def check_options(options: EvaluateArguments) -> None:
    """Refuse what cannot go together, before a model is loaded.

    Raises:
        ValueError: Attacks on a streamed model, or the choice of a scale without an adapter.
    """
    if options.stream and options.attacks:
        raise ValueError("attacks change or generate with the whole model, which a streamed one is not; leave them out")
    if options.adapter is None and (options.retain_share is not None or options.forget_limit is not None):
        raise ValueError("--retain_share and --forget_limit choose the scale of an adapter; pass --adapter")


def base_of(options: EvaluateArguments) -> str:
    """The name of the base model.

    Raises:
        ValueError: Both or neither of adapter and model are given, or the base is not known.
    """
    if (options.adapter is None) == (options.unlearned_model is None):
        raise ValueError("pass either --adapter, or --unlearned_model and what it was before, --model_name_or_path")
    name = options.model_name_or_path
    if name is None and options.adapter is not None:
        name = read_config(options.adapter).base_model_name_or_path
    if not name:
        source = options.adapter or options.unlearned_model
        raise ValueError(f"{source} does not say which base model it is for; pass --model_name_or_path")
    return name


def suite_of(options: EvaluateArguments) -> Suite:
    """The suite that the options ask for.

    Raises:
        ValueError: The suite is unknown, or lacks its folder or its sets.
    """
    rows = {
        role: load_set(source, options)
        for role in ("forget", "retain", "holdout")
        if (source := getattr(options, f"{role}_dataset")) is not None
    }
    match options.suite:
        case "plain" if {"forget", "retain"} <= set(rows):
            suite = plain_suite(rows["forget"], rows["retain"], holdout_dataset=rows.get("holdout"), by=options.by)
        case "plain":
            raise ValueError("the suite 'plain' needs --forget_dataset and --retain_dataset")
        case "tofu" if options.tofu is not None:
            suite = tofu_suite(options.tofu, cast(Any, options.tofu_split))
        case "tofu":
            raise ValueError("the suite 'tofu' needs --tofu, the folder with TOFU's files")
        case "testbed":
            suite = testbed_suite()
        case other:
            raise ValueError(f"unknown suite {other!r}; use plain, tofu or testbed")
    if options.mmlu is None:
        return suite
    return Suite(suite.name, (*suite.sets, option_set(load_option_files(options.mmlu), by=("subject",))))


def split_off(
    suite: Suite, num_examples: int, *, seed: int, roles: Sequence[str] = ("forget", "retain")
) -> tuple[tuple[QuestionSet, ...], Suite]:
    """A few rows of the first set of each role, and the suite without them.

    Raises:
        ValueError: A set has no more rows than are to be split off.
    """
    chosen, rest = [], list(suite.sets)
    for part in (suite.of_role(role)[0] for role in roles):
        rows = cast(Dataset, part.rows)
        if len(rows) <= num_examples:
            raise ValueError(
                f"the {part.name} set has {len(rows)} rows, of which {num_examples} are to be set aside; lower "
                "--validation_examples or --attack_rows"
            )
        halves = rows.train_test_split(test_size=num_examples, seed=seed)
        chosen.append(replace(part, rows=halves["test"]))
        rest[rest.index(part)] = replace(part, rows=halves["train"])
    return tuple(chosen), Suite(suite.name, tuple(rest))


def attacks_of(
    options: EvaluateArguments, suite: Suite, tokenizer: Any, *, base: Any = None
) -> tuple[dict[str, Attack], Suite]:
    """The attacks that the options ask for, by name, and the suite without the rows that these attacks use.

    Args:
        options: The options.
        suite: What the options ask.
        tokenizer: Of the models.
        base: What routes under expert_forcing; None: the model with its adapter off.

    Raises:
        ValueError: An attack is unknown, the file has options of one that is not asked for, a further set has no name,
            or the forget set is too small.
    """
    unknown = sorted(set(options.attacks) - set(ATTACKS))
    if unknown:
        raise ValueError(f"there is no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")
    given = read_options(options.attack_options) if options.attack_options else {}
    unused = sorted(set(given) - set(options.attacks))
    if unused:
        raise ValueError(f"{options.attack_options} has options of {unused}, which --attacks does not ask for")
    further = further_sets(options)
    defaults: dict[str, dict[str, Any]] = {"paraphrase": {"column": OTHER_PROMPT}, "expert_forcing": {"base": base}}
    if set(options.attacks) & {"relearning", "soft_prompt", "gcg", "few_shot"}:
        parts, suite = split_off(suite, options.attack_rows, seed=options.seed, roles=("forget",))
        rows = cast(Dataset, parts[0].rows)
        trained = {"dataset": rows, "processing_class": tokenizer}
        defaults |= {"relearning": trained, "soft_prompt": trained, "gcg": trained}
        if {"prompt", "completion"} <= set(rows.column_names):
            shown = rows.select(range(min(3, len(rows))))
            defaults["few_shot"] = {"examples": [(row["prompt"], row["completion"]) for row in shown]}
    own = {name: {**defaults.get(name, {}), **(given.get(name) or {})} for name in options.attacks}
    attacks: dict[str, Attack] = {
        name: partial(run_attack, cast(AttackName, name), **settings) for name, settings in own.items()
    }
    for name, rows in further.items():
        attacks[f"relearning, {name}"] = partial(run_attack, "relearning", **{**own["relearning"], "dataset": rows})
    return attacks, suite


def further_sets(options: EvaluateArguments) -> dict[str, Dataset]:
    """The sets of `--relearning_datasets` by name; errors as in `attacks_of`."""
    if options.relearning_datasets and "relearning" not in options.attacks:
        raise ValueError("--relearning_datasets are for the attack relearning, which --attacks does not ask for")
    found = {}
    for source in options.relearning_datasets:
        name, separator, path = source.partition("=")
        if not (name and separator and path):
            raise ValueError(f"--relearning_datasets takes NAME=FILE, such as benign=text.jsonl, got {source!r}")
        found[name] = load_set(path, options)
    return found
