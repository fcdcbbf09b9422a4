"""The model card of a saved adapter says how to load it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from uoe_peft import UnlearningTrainer
from uoe_peft.training.model_card import add_loading_section
from uoe_peft.tuner import UOEConfig


def test_the_card_of_a_saved_adapter_names_the_import_and_the_expert(
    make_trainer: Callable[..., UnlearningTrainer], uoe_model: PeftModel, tmp_path: Path
) -> None:
    ((layer_idx, expert_idx), *_) = uoe_model.peft_config["default"].target_experts
    trainer = make_trainer(uoe_model)
    trainer.save_model(str(tmp_path / "adapter"))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("import uoe_peft") == 1
    assert f"expert {expert_idx} of layer {layer_idx}" in card
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "import uoe_peft" in card and "2411.18797" in card


def test_the_section_is_added_once_and_to_uoe_adapters_only(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    add_loading_section(readme, [UOEConfig(target_experts=[(1, 2)])])
    assert not readme.exists()
    readme.write_text("# Card\n")
    add_loading_section(readme, [])
    assert readme.read_text() == "# Card\n"
    add_loading_section(readme, [UOEConfig(target_experts=[(1, 2)])])
    readme.write_text(readme.read_text() + "\nWhat a user added.\n")
    add_loading_section(readme, [UOEConfig(target_experts=[(1, 2)])])
    card = readme.read_text()
    assert card.count("## Loading this adapter") == card.count("import uoe_peft") == 1
    assert card.startswith("# Card\n") and card.endswith("```\n\nWhat a user added.\n")
