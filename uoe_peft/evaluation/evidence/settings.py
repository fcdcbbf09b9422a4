"""With what, and on what, an evaluation was made."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from uoe_peft.evaluation.measure import Asked, Asking
from uoe_peft.evaluation.suites.suite import Suite

_VERSIONS = ("uoe-peft", "torch", "transformers", "peft", "datasets")


def settings_of(
    model: PeftModel | PreTrainedModel, suite: Suite, sets: Mapping[str, Asked], asking: Asking, **others: Any
) -> dict[str, Any]:
    """What an evaluation was made with and on, as plain JSON.

    Args:
        model: The evaluated model.
        suite: What it was asked.
        sets: The examples of each set that were asked.
        asking: How they were asked.
        **others: Further settings by name.
    """
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    targets = getattr(config, "target_experts", None)
    return {
        "suite": suite.name,
        "examples": {name: len(asked.columns) for name, asked in sets.items()},
        "model": _model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "adapter": None if config is None else str(getattr(config.peft_type, "value", config.peft_type)),
        "target_experts": [list(pair) for pair in targets] if isinstance(targets, (list, tuple)) else None,
        "batch_size": asking.batch_size,
        "max_new_tokens": asking.max_new_tokens,
        **others,
        "versions": {name: _version(name) for name in _VERSIONS},
    }


def _model_name(model: PeftModel | PreTrainedModel) -> str:
    """Its name on the Hub, or the end of its folder's path: where a report was made says nothing to its readers."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    name = str(getattr(model.config, "_name_or_path", "")) or type(plain).__name__
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
