"""What training tells an adapter's model card, and TRL's card in its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from uoe_peft.tuner import UOEConfig
from uoe_peft.tuner.card import CITATION, PAPER_ID, write_card

PAPER = {
    "title": "UOE: Unlearning One Expert Is Enough for Mixture-of-Experts LLMs",
    "id": PAPER_ID,
    "citation": CITATION,
}

# Numbers and choices only: nothing here is, names or comes from the data.
_SETTINGS = (
    "forget_loss",
    "retain_loss",
    "forget_weight",
    "retain_weight",
    "alternative_weight",
    "anchor_weight",
    "beta",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_length",
    "seed",
)


def add_loading_section(readme: Path, configs: Sequence[UOEConfig]) -> None:
    """Replace a model card that another library wrote by that of UOE adapters.

    Args:
        readme: The card; nothing happens where there is none.
        configs: Of the model's active UOE adapters; nothing happens where there is none.
    """
    if configs and readme.is_file():
        names = ["default", *(f"adapter {index}" for index in range(2, len(configs) + 1))]
        write_card(readme.parent, dict(zip(names, configs, strict=True)))


def record_training(configs: Sequence[UOEConfig], args: Any, *, figures: Mapping[str, float] | None = None) -> None:
    """Write down in adapters' configurations how they were trained, for their model card.

    Args:
        configs: Of the trained adapters; changed in place.
        args: The training's arguments, of which numbers and choices are taken, and `forgets` where they have it: what
            is forgotten, in the user's own words.
        figures: Results by name, such as the last evaluation's.
    """
    settings = {name: _plain(getattr(args, name, None)) for name in _SETTINGS}
    for config in configs:
        record = dict(config.provenance or {})
        record["training"] = {name: value for name, value in settings.items() if value is not None}
        if getattr(args, "forgets", None):
            record["forgets"] = args.forgets
        if figures:
            record["figures"] = {name: float(value) for name, value in figures.items() if isinstance(value, Number)}
        config.provenance = record


def _plain(value: Any) -> Any:
    value = getattr(value, "value", value)  # choices may be members of an enumeration
    return value if value is None or isinstance(value, bool | int | float | str) else None
