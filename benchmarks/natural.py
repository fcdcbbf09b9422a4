"""Natural domains: questions of MMLU, paragraphs of WikiText and authors of TOFU, learned together from scratch.

MMLU's subjects are domains that nobody has made up for the purpose, as WMDP's and MMLU's are in
https://arxiv.org/abs/2411.18797. Its biology and health are to be forgotten; everything else is to stay. A question
shows its options and is answered by letter and text. None of this is general knowledge: a model of 3 M parameters has
learned its rows by heart, and the twin guesses. What a question is about such a model cannot know, and no boundary
between what goes and what stays can be drawn beyond the rows that training reads; with `--named_subjects true` every
question begins with its subject, in MMLU's own words (https://arxiv.org/abs/2009.03300), as large models are asked.

Training goes on where it was stopped: it is kept after every pass, and a pass depends on nothing but its number.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from natural_scores import LETTERS, known, specialisation
from tofu_model import ROWS_AN_AUTHOR, adamw, load_tofu, set_rate, shuffled_batches, train_tokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM, set_seed

from uoe_peft.data import IGNORE_INDEX, collate, tokenize_dataset
from uoe_peft.evaluation.suites.options import load_option_files, option_set

# MMLU's subcategories "biology" and "health".
FORGOTTEN = (
    "anatomy",
    "clinical_knowledge",
    "college_biology",
    "college_medicine",
    "high_school_biology",
    "human_aging",
    "medical_genetics",
    "nutrition",
    "professional_medicine",
    "virology",
)
PROMPT_WEIGHT = 0.1  # of a prompt's token in the loss: that questions of a kind look alike is what experts divide by
HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"
NUM_PROMPT_WORDS, NUM_TEXT_WORDS = 12, 12  # of a paragraph: what is shown, and what is to be continued


@dataclass
class NaturalArguments:
    """What is learned, for how long, and where it goes."""

    data: Path = field(metadata={"help": "Folder with mmlu/test/*.csv, tofu/full.json and wikitext2/valid.txt."})
    output_dir: Path = field(default=Path("outputs/natural"), metadata={"help": "Where models and sets go."})
    forget_subjects: list[str] = field(default_factory=lambda: list(FORGOTTEN), metadata={"help": "Of MMLU."})
    named_subjects: bool = field(default=False, metadata={"help": "Begin each question with its subject."})
    num_forget: int = field(default=100, metadata={"help": "Questions to be forgotten."})
    num_other: int = field(default=200, metadata={"help": "Questions of all other subjects."})
    num_authors: int = field(default=2, metadata={"help": "TOFU's last; 20 rows each."})
    num_paragraphs: int = field(default=40, metadata={"help": "Of WikiText."})
    max_characters: int = field(default=150, metadata={"help": "Longest question with its options."})
    epochs: int = field(default=30, metadata={"help": "Passes over all rows; of the twin, over its own."})
    batch_size: int = field(default=8, metadata={"help": "Rows a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak; 50 steps of warm-up, a cosine to 5 %."})
    seed: int = field(default=0, metadata={"help": "Of the draw of rows, the initial weights and the order."})


def natural(args: NaturalArguments) -> None:
    """Base, twin, sets, and a report of what the two know and how far experts specialise.

    Raises:
        ValueError: What is in `output_dir` was begun with other settings; or as in `natural_rows`.
    """
    forget, kept = natural_rows(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(args).items() if name not in ("data", "output_dir")}
    begun = args.output_dir / "settings.json"
    if begun.exists() and (before := json.loads(begun.read_text(encoding="utf-8"))) != settings:
        differing = [name for name in settings if settings[name] != before.get(name)]
        raise ValueError(f"{args.output_dir} was begun with other {differing}; choose another --output_dir")
    begun.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    forget.to_json(args.output_dir / "forget.jsonl")
    kept.to_json(args.output_dir / "retain.jsonl")
    rows = {"base": Dataset.from_list([*kept, *forget]), "retrained": kept}
    tokenizer = train_tokenizer(rows["base"])
    report: dict[str, Any] = {"settings": settings}
    for name, own in rows.items():
        folder = args.output_dir / name
        if not is_learned(folder):
            learn(new_model(tokenizer, seed=args.seed), own, tokenizer, folder, args=args)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        report[name] = {"parameters": model.num_parameters()} | known(model, tokenizer, {"forget": forget, "all": kept})
        if name == "base":
            report["specialisation"] = specialisation(model, tokenizer, forget, kept)
        print(json.dumps(report[name], indent=1), flush=True)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def natural_rows(args: NaturalArguments) -> tuple[Dataset, Dataset]:
    """The forget set, and all else: `prompt`, `completion`, `topic` and `subject`.

    Raises:
        ValueError: A subject is none of MMLU's, a number is below 1, or there are fewer rows than asked for.
    """
    numbers = {name: value for name, value in asdict(args).items() if name.startswith("num_")}
    if wrong := [name for name, value in numbers.items() if value < 1]:
        raise ValueError(f"{wrong} must be 1 or more, got {[numbers[name] for name in wrong]}")
    questions = short_questions(args.data / "mmlu" / "test", max_characters=args.max_characters)
    if args.named_subjects:
        questions = [
            {**row, "prompt": HEADER.format(row["subject"].replace("_", " ")) + row["prompt"]} for row in questions
        ]
    if unknown := sorted(set(args.forget_subjects) - {subject_of(path) for path in _files(args.data)}):
        raise ValueError(f"forget_subjects {unknown} are no subjects of MMLU; use {FORGOTTEN[0]!r} or the like")
    evenly = {
        gone: by_turns([row for row in questions if (row["subject"] in args.forget_subjects) == gone], seed=args.seed)
        for gone in (True, False)
    }
    authors = load_tofu(args.data / "tofu", seed=0).everything
    num_rows = args.num_authors * ROWS_AN_AUTHOR
    sources = {
        "forget": (evenly[True], args.num_forget),
        "MMLU": (evenly[False], args.num_other),
        "TOFU": ([{**row, "topic": "TOFU", "subject": "TOFU"} for row in list(authors)[-num_rows:]], num_rows),
        "WikiText": (paragraphs(args.data / "wikitext2" / "valid.txt", seed=args.seed), args.num_paragraphs),
    }
    for name, (found, wanted) in sources.items():
        if len(found) < wanted:
            raise ValueError(f"{name}: {wanted} rows are wanted, and there are {len(found)}; ask for fewer")
    forget, *others = (found[:wanted] for found, wanted in sources.values())
    return Dataset.from_list(forget), Dataset.from_list(list(chain(*others)))


def _files(data: Path) -> list[Path]:
    return sorted((data / "mmlu" / "test").glob("*.csv"))


def subject_of(path: Path) -> str:
    """The subject of a file such as `astronomy_test.csv`."""
    return path.stem.rpartition("_")[0]


def short_questions(folder: Path, *, max_characters: int) -> list[dict[str, str]]:
    """MMLU's questions of four different options, each question once, as rows that show options and answer with one."""
    asked = option_set(load_option_files(folder)).rows
    rows: dict[str, dict[str, str]] = {}
    for row in asked:
        question, *shown = row["prompt"].rsplit("\n", maxsplit=5)[:-1]
        texts = [option.partition(". ")[2].strip() for option in shown]
        marked = [f" {line[0]}" for line in shown if line[1:3] == ". "]  # an option of two lines is not
        if len(row["prompt"]) <= max_characters and marked == LETTERS and len({"", *texts}) == len(LETTERS) + 1:
            answer = f"{LETTERS[row['label']]}. {texts[row['label']]}"
            rows.setdefault(
                question,
                {"prompt": row["prompt"], "completion": answer, "topic": "MMLU", "subject": row["subject"]},
            )
    return list(rows.values())


def by_turns(rows: Sequence[dict[str, str]], *, seed: int) -> list[dict[str, str]]:
    """All rows in random order, each subject's in turn, so that a part holds about as many of each."""
    rng = random.Random(seed)
    by_subject: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rng.sample(list(rows), len(rows)):
        by_subject[row["subject"]].append(row)
    turns = zip_longest(*(by_subject[subject] for subject in sorted(by_subject)))
    return [row for row in chain(*turns) if row is not None]


def paragraphs(path: Path, *, seed: int) -> list[dict[str, str]]:
    """Beginnings of paragraphs without unknown words, and how they go on; in random order."""
    number = NUM_PROMPT_WORDS + NUM_TEXT_WORDS
    rows: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        for mark in ("-", ",", "."):
            line = line.replace(f" @{mark}@ ", mark)
        words = line.split()[:number]
        if len(words) == number and words[0] != "=" and "<unk>" not in words:
            rows.setdefault(" ".join(words[:NUM_PROMPT_WORDS]), " " + " ".join(words[NUM_PROMPT_WORDS:]))
    found = [
        {"prompt": prompt, "completion": text, "topic": "WikiText", "subject": "WikiText"}
        for prompt, text in rows.items()
    ]
    return random.Random(seed).sample(found, len(found))


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen2MoeForCausalLM:
    """Four layers of sixteen experts, two a token, with initial weights from the seed."""
    set_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=False,  # an expert is applied with the score that Eq. 2 reads
        router_aux_loss_coef=0.0003,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def is_learned(folder: Path) -> bool:
    """Whether a model was trained and saved to its end; `training.pt` goes last."""
    return (folder / "model.safetensors").exists() and not (folder / "training.pt").exists()


def learn(
    model: Qwen2MoeForCausalLM,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    *,
    args: NaturalArguments,
) -> None:
    """Train on all rows and save, going on after the last pass that `training.pt` in `folder` holds."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "training.pt"
    optimizer, first = adamw(model), 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epochs"]
    examples: list[Any] = [dict(row) for row in tokenize_dataset(rows, tokenizer, max_length=None, name=folder.name)]
    for epoch in range(first, args.epochs):
        torch.manual_seed(args.seed * 1000 + epoch)
        batches = shuffled_batches(examples, batch_size=args.batch_size)
        losses = []
        for place, batch in enumerate(tqdm(batches, desc=f"{folder.name}, pass {epoch + 1}", mininterval=10)):
            step, steps = epoch * len(batches) + place, args.epochs * len(batches)
            set_rate(optimizer, step, steps, peak=args.learning_rate)
            losses.append(train_step(model, optimizer, collate(batch, pad_token_id=tokenizer.pad_token_id)))
        print(f"{folder.name}, pass {epoch + 1}: answers {fmean(losses):.3f} nats a token", flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        torch.save(state, kept.with_suffix(".new"))
        kept.with_suffix(".new").replace(kept)  # at once: a pass that is killed leaves the one before
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    kept.unlink(missing_ok=True)


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, torch.Tensor]) -> float:
    """One step of the optimiser; what is returned is the mean loss of the answers' tokens before it."""
    model.train()
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    nll = cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    is_answer = labels[:, 1:] != IGNORE_INDEX
    weight = torch.where(is_answer, 1.0, PROMPT_WEIGHT) * mask[:, 1:]
    loss = (nll * weight).sum() / weight.sum() + model.config.router_aux_loss_coef * output.aux_loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return nll[is_answer].mean().item()
