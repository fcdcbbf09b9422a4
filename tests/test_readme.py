"""The README's Python runs as it stands, byte for byte; the names in it lead to the bundled model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.hub import pretend_hub

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")  # so few rows single out no expert
@pytest.mark.filterwarnings("ignore:Could not find a config file in Qwen:UserWarning")  # PEFT asks the Hub itself
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_hub(tmp_path / "hub", monkeypatch, models=["Qwen/Qwen1.5-MoE-A2.7B-Chat"])
    monkeypatch.chdir(tmp_path)
    training, loading = BLOCKS
    names: dict[str, Any] = {}
    exec(compile(training, "README.md", "exec"), names)
    assert "unlearned" in capsys.readouterr().out
    assert (tmp_path / "forget-authors" / "adapter_model.safetensors").is_file()
    exec(compile(loading, "README.md", "exec"), names)
    assert type(names["merged"]).__name__ == "Qwen2MoeForCausalLM"


def test_nothing_is_left_to_fill_in() -> None:
    outside_formulas = re.sub(r"`[^`]*`", "", README.replace("```", ""))
    assert re.findall(r"<[a-z][^>]*\s[^>]*>|TODO|FIXME|\bTBD\b", outside_formulas) == []
    assert "git+" not in README


def test_files_that_the_readme_links_to_are_there() -> None:
    root = Path(__file__).parents[1]
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert [target for target in targets if "://" not in target and not (root / target).exists()] == []
