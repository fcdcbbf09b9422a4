"""The public door: quick to open, complete, and it registers the method with PEFT in either order."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import uoe_peft


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_loads_nothing_heavy_and_still_registers_with_peft() -> None:
    loaded, kinds = run(
        "import json, sys, uoe_peft\n"
        "heavy = [name for name in ('torch', 'transformers', 'peft', 'trl', 'datasets') if name in sys.modules]\n"
        "from peft import PeftType, get_peft_config\n"
        "config = get_peft_config({'peft_type': 'UOE', 'target_experts': [(0, 1)]})\n"
        "print(json.dumps([heavy, [PeftType.UOE.value, type(config).__module__]]))"
    ).split("]", 1)
    assert json.loads(loaded[1:] + "]") == []
    assert json.loads(kinds.strip(", \n")[:-1]) == ["UOE", "uoe_peft.tuner.config"]


def test_peft_may_come_first() -> None:
    assert run("import peft, uoe_peft; print(peft.PeftType('UOE').value)").strip() == "UOE"


def test_each_name_is_there_and_listed() -> None:
    assert all(getattr(uoe_peft, name).__name__ == name for name in uoe_peft.__all__)
    assert set(uoe_peft.__all__) <= set(dir(uoe_peft))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(uoe_peft.__file__).read_text())
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: f"uoe_peft.{uoe_peft._ROOM_OF[name]}" for name in uoe_peft.__all__}


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'forget'"):
        uoe_peft.forget  # noqa: B018
