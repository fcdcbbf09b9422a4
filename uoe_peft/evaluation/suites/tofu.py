"""TOFU (https://arxiv.org/abs/2401.06121) from a folder of its JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from uoe_peft.evaluation.suites.suite import PARAPHRASED, PERTURBED, QuestionSet, SetRole, Suite

ForgetSplit = Literal["forget01", "forget05", "forget10"]

_SETS: dict[str, SetRole] = {"retain": "retain", "real_authors": "retain", "world_facts": "retain"}


def tofu_suite(
    folder: str | PathLike[str],
    split: ForgetSplit = "forget10",
    *,
    prompt: Callable[[str], Any] = "Question: {}\nAnswer:".format,
    completion: Callable[[str], Any] = " {}".format,
) -> Suite:
    """TOFU's four sets: forget, retain, real authors, world facts.

    Args:
        folder: Holds `<split>_perturbed.json`, `retain_perturbed.json`, `real_authors_perturbed.json` and
            `world_facts_perturbed.json`, as the set on the Hub does.
        split: What was forgotten.
        prompt: Makes a prompt of a question: a string, or a list of messages for a chat model.
        completion: Makes a completion of an answer, of the same kind.

    Returns:
        The suite. Forget quality needs a retrained reference in the evaluation.

    Raises:
        ValueError: The split is unknown, or a file or a column of it is missing.
    """
    if split not in ("forget01", "forget05", "forget10"):
        raise ValueError(f'split must be "forget01", "forget05" or "forget10", got {split!r}')
    roles: dict[str, SetRole] = {split: "forget", **_SETS}
    sets = []
    for name, role in roles.items():
        rows = [_as_row(row, prompt, completion) for row in _read(Path(folder), f"{name}_perturbed.json")]
        called = "forget" if role == "forget" else name
        sets.append(QuestionSet(called, Dataset.from_list(rows), role, utility=role == "retain"))
    return Suite(f"TOFU {split}", tuple(sets))


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    if not path.is_file():
        found = sorted(other.name for other in folder.glob("*.json"))
        raise ValueError(f"{folder} has no {name}; it has {found or 'no JSON files'}: download all of TOFU's splits")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for place, row in enumerate(rows):
        missing = {"question", "answer", "perturbed_answer"} - set(row)
        if missing:
            raise ValueError(f"line {place + 1} of {path} lacks {sorted(missing)}; it has {sorted(row)}")
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _as_row(row: dict[str, Any], prompt: Callable[[str], Any], completion: Callable[[str], Any]) -> dict[str, Any]:
    content = {"prompt": prompt(row["question"]), "completion": completion(row["answer"])}
    if "paraphrased_answer" in row:
        content[PARAPHRASED] = completion(row["paraphrased_answer"])
    return content | {PERTURBED: [completion(answer) for answer in row["perturbed_answer"]]}
