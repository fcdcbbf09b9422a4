"""The card of a trained adapter: how it was trained, and nothing of what it was trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel

from tests.training.conftest import make_sets
from uoe_peft import UnlearningTrainer
from uoe_peft.training.model_card import add_loading_section, record_training
from uoe_peft.tuner import UOEConfig


def texts() -> set[str]:
    """Everything that the sets say."""
    rows = [row for rows in make_sets() for row in rows]
    return {str(value) for row in rows for value in row.values() if len(str(value)) > 3}


def test_saving_and_pushing_a_trainer_write_the_same_card_without_the_data(
    make_trainer: Callable[..., UnlearningTrainer],
    uoe_model: PeftModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ((layer_idx, expert_idx), *_) = uoe_model.peft_config["default"].target_experts
    trainer = make_trainer(uoe_model, forgets="a made-up town", hub_model_id="org/forget-x")
    trainer.save_model(str(tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("import uoe_peft") == 1 and "> a made-up town" in card
    assert f"| {layer_idx} | {expert_idx} |" in card and f"- forget_loss: {trainer.args.forget_loss}" in card
    pushed: dict[str, bytes] = {}

    def upload_folder(*, folder_path: str, **_: Any) -> None:
        pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()})

    hub = SimpleNamespace(
        create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id), upload_folder=upload_folder
    )
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer.push_to_hub()
    assert pushed["README.md"].decode() == card
    assert "2411.18797" in card
    for name in ("README.md", "adapter_config.json"):
        assert not [text for text in texts() if text in pushed[name].decode()]


def test_only_numbers_choices_and_the_users_words_are_recorded() -> None:
    config = UOEConfig(target_experts=[(1, 2)], provenance={"other": 1})
    args = SimpleNamespace(forget_loss="npo", seed=3, beta=None, forgets=None, output_dir="/home/me", optim=["x"])
    record_training([config], args, figures={"forget_rouge": 0.5, "text": "no"})  # type: ignore[dict-item]
    assert config.provenance == {
        "other": 1,
        "training": {"forget_loss": "npo", "seed": 3},
        "figures": {"forget_rouge": 0.5},
    }


def test_cards_of_other_adapters_stay(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    add_loading_section(readme, [UOEConfig(target_experts=[(1, 2)])])
    assert not readme.exists()
    readme.write_text("# Card\n")
    add_loading_section(readme, [])
    assert readme.read_text() == "# Card\n"
