"""The project's own test ground: made-up facts, and two small models that learned them with and without the secret."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from uoe_peft.testbed.facts import TOPICS, generate_facts

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FORGET_TOPIC", "TOPICS", "CheckpointName", "checkpoint_path", "generate_facts", "load_facts"]

CheckpointName = Literal["base", "retrained"]

FORGET_TOPIC = "potions"


def load_facts(topics: Sequence[str] | None = None) -> Dataset:
    """Return the facts that the bundled checkpoints were trained on, as prompts and completions.

    Args:
        topics: Which topics, in which order; `None` for all.

    Returns:
        A dataset with the columns `prompt` and `completion` (TRL's prompt-completion form) and those of
        `generate_facts`. The completion starts with a space and does not contain the end-of-sequence
        token: the checkpoints expect it after every completion, and TRL appends it.

    Raises:
        ValueError: A topic is unknown, or `topics` is empty.
        TypeError: `topics` is a single string.
    """
    from datasets import Dataset  # takes a second to import, which users of the generator need not pay

    if isinstance(topics, str):
        raise TypeError(f"topics is a sequence of names, got the string {topics!r}; use [{topics!r}]")
    chosen = TOPICS if topics is None else tuple(topics)
    if not chosen:
        raise ValueError(f"topics is empty; use None for all, or some of {', '.join(sorted(TOPICS))}")
    rows = [fact for topic in chosen for fact in generate_facts(topic)]
    return Dataset.from_list(
        [{"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}", **row} for row in rows]
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
