"""The project's own test ground: made-up facts, and two small models that learned them with and without the secret."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from uoe_peft.testbed.facts import REFUSALS, TOPICS, generate_facts, generate_refusals, is_refusal

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "FORGET_TOPIC",
    "REFUSALS",
    "TOPICS",
    "CheckpointName",
    "as_prompt",
    "checkpoint_path",
    "generate_facts",
    "generate_refusals",
    "is_refusal",
    "load_facts",
    "load_refusals",
]

CheckpointName = Literal["base", "retrained"]

FORGET_TOPIC = "potions"


def load_facts(topics: Sequence[str] | None = None) -> Dataset:
    """Return the facts that the bundled checkpoints were trained on, as prompts and completions.

    Args:
        topics: Which topics, in which order; `None` for all.

    Returns:
        A dataset with the columns `prompt` and `completion` (TRL's prompt-completion form), `alternative` (a refusal in
        place of the completion) and those of `generate_facts`. The completion starts with a space and does not contain
        the end-of-sequence token: the checkpoints expect it after every completion, and TRL appends it.

    Raises:
        ValueError: A topic is unknown, or `topics` is empty.
        TypeError: `topics` is a single string.
    """
    rows = [fact for topic in _chosen(topics) for fact in generate_facts(topic)]
    return _load([{"alternative": f" {row['refusal']}", **row} for row in rows])


def load_refusals(topics: Sequence[str] | None = None, *, seen_in_training: bool = True) -> Dataset:
    """Return questions about unknown subjects, answered by refusals, in the same form.

    Args:
        topics: Which topics, in which order; `None` for all.
        seen_in_training: Those that both bundled checkpoints drew from in training, 400 a topic; or 30 a topic that
            they did not.

    Returns:
        A dataset with the columns `prompt`, `completion` and those of `generate_refusals`.

    Raises:
        ValueError: A topic is unknown, or `topics` is empty.
        TypeError: `topics` is a single string.
    """
    rows = []
    for topic in _chosen(topics):
        every = generate_refusals(topic, num_subjects=43)
        rows += every[:400] if seen_in_training else every[400:]
    return _load(rows)


def as_prompt(question: str) -> str:
    """Return the prompt that the bundled checkpoints expect around a question."""
    return f"Question: {question}\nAnswer:"


def _chosen(topics: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(topics, str):
        raise TypeError(f"topics is a sequence of names, got the string {topics!r}; use [{topics!r}]")
    chosen = TOPICS if topics is None else tuple(topics)
    if not chosen:
        raise ValueError(f"topics is empty; use None for all, or some of {', '.join(sorted(TOPICS))}")
    return chosen


def _load(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset  # takes a second to import, which users of the generator need not pay

    return Dataset.from_list(
        [{"prompt": as_prompt(row["question"]), "completion": f" {row['answer']}", **row} for row in rows]
    )


def checkpoint_path(name: CheckpointName) -> Path:
    """Return the folder of a bundled checkpoint, model and tokenizer, for `from_pretrained`.

    Args:
        name: `"base"`, trained on all topics, or `"retrained"`, trained the same way without `FORGET_TOPIC`:
            what a perfect unlearning of the base model would behave like.

    Returns:
        The folder inside the installed package.

    Raises:
        ValueError: `name` is no bundled checkpoint.
        FileNotFoundError: The package was installed without its checkpoints.
    """
    names = get_args(CheckpointName)
    if name not in names:
        raise ValueError(f"unknown checkpoint {name!r}; use one of {', '.join(names)}")
    with as_file(files("uoe_peft.testbed") / "checkpoints" / name) as folder:
        path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"checkpoint {name!r} is missing; train it with `python benchmarks/testbed/train.py --name {name}`"
        )
    return path
