"""The README's example runs, with the bundled model in the place of the one that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from uoe_peft.testbed import FORGET_TOPIC, TOPICS, checkpoint_path, load_facts

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")  # so few rows single out no expert
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load_dataset(name: str, configuration: str, *, split: str) -> Dataset:
        topic = {"forget05": FORGET_TOPIC, "retain95": TOPICS[0]}[configuration]
        return load_facts([topic]).select(range(8)).select_columns(["question", "answer"])

    def with_template(path: str, **options: Any) -> Any:
        tokenizer = original(path, **options)
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    original = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", with_template)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)

    code = BLOCKS[0].replace('"Qwen/Qwen1.5-MoE-A2.7B-Chat"', repr(str(checkpoint_path("base"))))
    assert "Qwen" not in code
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "unlearned" in capsys.readouterr().out

    loading = BLOCKS[1].replace("base", "trainer.model.unload()", 1)
    assert (tmp_path / "forget-authors" / "adapter_model.safetensors").is_file()
    exec(compile(loading, "README.md", "exec"), names)
    assert type(names["merged"]).__name__ == "Qwen2MoeForCausalLM"
