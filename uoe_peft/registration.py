"""Registers UOE with PEFT whichever of the two packages is imported first, without importing PEFT by itself.

Importing PEFT takes seconds, which neither `uoe-peft --help` nor a process that only reads a report should wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_METHOD = "uoe_peft.tuner"  # importing it registers


class _AfterPeft(MetaPathFinder):
    """Lets the other finders find PEFT, and registers UOE as soon as it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of PEFT, whose loader then also registers; None for every other module."""
        if fullname != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: Any) -> None:
    """Make `loader`, which belongs to one spec alone, register UOE after it has executed its module."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        import_module(_METHOD)

    loader.exec_module = exec_module


def register_with_peft() -> None:
    """Register now where PEFT is imported already, else when it is."""
    if "peft" in sys.modules:
        import_module(_METHOD)
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
