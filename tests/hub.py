"""A Hub on this machine, for code that runs as it stands in the README and in the documentation: names lead to the
bundled model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from datasets import Dataset

from uoe_peft.testbed import FORGET_TOPIC, checkpoint_path, load_facts

_COMMIT = "0" * 40
_TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
_TOPICS = {"forget05": FORGET_TOPIC, "retain95": "towns"}


def pretend_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, *, models: Sequence[str]) -> None:
    """Let transformers find models, and datasets TOFU, where they would keep what they have downloaded.

    Args:
        folder: An empty one, the cache from now on.
        monkeypatch: Takes it back.
        models: Names on the Hub that lead to the bundled model, with a chat template.
    """
    for name in models:
        place = folder / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / _COMMIT
        snapshot.mkdir(parents=True)
        for file in checkpoint_path("base").iterdir():
            (snapshot / file.name).symlink_to(file)
        (snapshot / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(_COMMIT, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("datasets.load_dataset", _tofu)


def _tofu(name: str, configuration: str, *, split: str) -> Dataset:
    assert (name, split) == ("locuslab/TOFU", "train")
    return load_facts([_TOPICS[configuration]]).select(range(8)).select_columns(["question", "answer"])
