"""Every way of saving an adapter writes the same card, and nothing of the data is in it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from tests.tuner.conftest import make_config
from uoe_peft.tuner import UOEConfig, UOEModel, write_card
from uoe_peft.tuner.card import write_cards_on_saving

RECORD = {
    "forgets": "The plots of a series of novels.\nAsked for by its author.",
    "training": {"forget_loss": "npo", "learning_rate": 1e-4, "note": "Who wrote it? Ann did."},
    "figures": {"forget ROUGE": 0.1, "forget_rouge": 0.0625},
}


def parts(text: str) -> tuple[dict[str, object], str]:
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_saving_a_model_writes_the_card(qwen: PreTrainedModel, tmp_path: Path) -> None:
    model = get_peft_model(qwen, make_config(qwen, delta_type="low_rank", provenance=RECORD))
    model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen1.5-MoE-A2.7B-Chat"
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # else PEFT asks the Hub for the base's vocabulary
    text = (tmp_path / "README.md").read_text()
    head, body = parts(text)
    assert head["library_name"] == "peft" and head["base_model"] == "Qwen/Qwen1.5-MoE-A2.7B-Chat"
    assert head["base_model_relation"] == "adapter" and "base_model:adapter:Qwen/Qwen1.5-MoE-A2.7B-Chat" in head["tags"]
    code = re.search(r"```python\n(.*?)```", body, flags=re.DOTALL)
    assert code is not None and code[1].startswith("import uoe_peft")
    assert "> The plots of a series of novels.\n> Asked for by its author." in body
    assert "| 2 | 1 |" in body and "low_rank, rank 3, scale 32 / 3" in body
    assert "- forget_loss: npo\n- learning_rate: 0.0001" in body and "- forget_rouge: 0.0625" in body
    assert "Ann did" not in text and "More Information Needed" not in text
    assert "whoever holds the base model holds the knowledge" in body.lower()
    loaded = UOEConfig.from_pretrained(str(tmp_path))
    assert loaded.provenance == RECORD


def test_a_local_base_is_never_named(qwen: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in (str(tmp_path / "base"), "models/mine", "./base", "C:\\models\\base", None):
        model = UOEConfig(target_experts=[(2, 1)], base_model_name_or_path=name)
        write_card(tmp_path, {"default": model})
        text = (tmp_path / "README.md").read_text()
        assert "base_model" not in parts(text)[0] and (name is None or name not in text)
        assert "Not stated." in text


def test_a_rank_is_said_of_low_rank_deltas_alone(tmp_path: Path) -> None:
    for options, line in (
        ({}, "- deltas: full\n"),
        (
            {"delta_type": "".join(["low", "_rank"]), "r": 4, "uoe_alpha": 8},
            "- deltas: low_rank, rank 4, scale 8 / 4\n",
        ),
        ({"delta_type": "low_rank", "r": 4, "use_rslora": True}, "- deltas: low_rank, rank 4, scale 32 / √4\n"),
    ):
        write_card(tmp_path, {"default": UOEConfig(target_experts=[(2, 1)], **options)})
        text = (tmp_path / "README.md").read_text()
        assert line in text and "- routers of these layers: full\n" in text
        assert "(adapter `" not in text  # there is only one
    write_card(tmp_path, {"default": UOEConfig(target_experts=[(2, 1)], train_router=False)})
    assert "- routers of these layers: unchanged\n" in (tmp_path / "README.md").read_text()


def test_a_choice_that_was_read_from_a_file_is_the_same_choice(tmp_path: Path) -> None:
    write_card(tmp_path, {"default": UOEConfig(target_experts="".join("auto"))})
    text = (tmp_path / "README.md").read_text()
    assert "not chosen yet" in text
    assert "chosen by attribution" not in text
    write_card(tmp_path, {"default": UOEConfig(target_experts=[(2, 1)])})
    assert "chosen by attribution" not in (tmp_path / "README.md").read_text()


def test_a_picture_is_shown_where_there_is_one(tmp_path: Path) -> None:
    configs = {"default": UOEConfig(target_experts=[(2, 1)])}
    write_card(tmp_path, configs)
    assert "![" not in (tmp_path / "README.md").read_text()
    (tmp_path / "report.png").touch()
    write_card(tmp_path, configs)
    assert "\n\n![Scores before and after](report.png)\n\n" in (tmp_path / "README.md").read_text()


def test_pefts_methods_are_replaced_once_and_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("create_or_update_model_card", "_upload_modified_files"):
        method = getattr(PeftModel, name)
        monkeypatch.setattr(PeftModel, name, method)  # put back afterwards
        write_cards_on_saving(UOEModel)
        assert getattr(PeftModel, name) is method and method.__name__ == name


def test_what_stands_below_the_line_is_kept_and_the_rest_is_current(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Another library's card\n[More Information Needed]\n")
    write_card(tmp_path, {"default": UOEConfig(target_experts=[(1, 2)])})
    readme.write_text(readme.read_text() + "What a user added.\n")
    write_card(tmp_path, {"default": UOEConfig(target_experts=[(4, 5)]), "second": UOEConfig(target_experts="auto")})
    text = readme.read_text()
    assert "Another library" not in text and "| 1 | 2 |" not in text and "| 4 | 5 |" in text
    assert text.endswith("What a user added.\n") and text.count("What a user added.") == text.count("## Limits") == 1
    assert "## What it edits (adapter `second`)" in text


def test_pushing_uploads_the_same_card(qwen: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, repo_id: str, **_: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations: list[SimpleNamespace], **_: object) -> None:
            files = {operation.path_in_repo: Path(operation.path_or_fileobj) for operation in operations}
            uploaded.update({name: path.read_bytes() for name, path in files.items()})

        def __getattr__(self, name: str) -> object:
            return lambda *_, **__: None

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    foreign = SimpleNamespace(save=lambda path: Path(path).write_text("transformers' card", encoding="utf-8"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: foreign)
    model = get_peft_model(qwen, make_config(qwen, provenance=RECORD))
    model.push_to_hub("org/forget-x")
    model.save_pretrained(tmp_path)
    assert uploaded["README.md"] == (tmp_path / "README.md").read_bytes()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(uploaded)


def test_adapters_of_other_kinds_keep_pefts_card(qwen: PreTrainedModel, tmp_path: Path) -> None:
    model = get_peft_model(qwen, LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "uoe" not in text.lower() and "PEFT" in text
