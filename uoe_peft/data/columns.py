"""Which columns a data set may have: those that are read, and those that say that it cannot be."""

from __future__ import annotations

from datasets import Dataset

from uoe_peft.data.conversations import CONVERSATION_COLUMNS

_OF_PACKED_ROWS = ("position_ids", "seq_lengths")
_NOT_TEXT = ("image", "images", "video", "videos", "audio", "audios")

# TRL's types that say more or less than which answer belongs to a prompt, and what to do with them.
_OTHER_TYPES = (
    (
        {"chosen", "rejected"},
        "preference",
        'forget_loss="dpo" and "idk" read it; for others rename a column',
    ),
    ({"prompt", "completions"}, "stepwise supervision", "join the steps of each row to one 'completion'"),
    ({"prompt"}, "prompt-only", "add the answers as a column 'completion'"),
)


def check_readable(dataset: Dataset, *, name: str) -> None:
    """Refuse sets whose rows are more than text, or are not what they seem.

    Args:
        dataset: The set.
        name: What messages call this set.

    Raises:
        ValueError: It holds images, is transformed when it is read, or its rows are packed.
    """
    if unread := sorted({*_NOT_TEXT} & {*dataset.column_names}):
        raise ValueError(
            f"the {name} set has the columns {unread}, and only text is read; to unlearn from its text alone, pass "
            f"dataset.remove_columns({unread})"
        )
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"the {name} set has a transform (with_transform), which would be applied once and for all, though it may "
            "give something else each time; apply it with dataset.map first"
        )
    if packed := sorted({*_OF_PACKED_ROWS} & {*dataset.column_names}):
        raise ValueError(
            f"the {name} set has the columns {packed}, as packed rows have: examples in one row would see each other; "
            f"pass the set as it was before packing, or dataset.remove_columns({packed}) if it never was"
        )


def check_columns(dataset: Dataset, *, text_field: str, name: str) -> None:
    """Refuse sets that have no text to read, or whose type says what would be ignored.

    Args:
        dataset: The set.
        text_field: Column of plain text.
        name: What messages call this set.

    Raises:
        ValueError: It is one of these.
    """
    columns = set(dataset.column_names)
    if "input_ids" in columns:
        return
    if {"prompt", "completion"} <= columns:
        if "label" in columns and getattr(dataset.features["label"], "dtype", None) == "bool":
            raise ValueError(
                f"the {name} set is of TRL's unpaired preference type, whose 'label' would be ignored; choose rows by "
                "it with dataset.filter, then pass dataset.remove_columns('label')"
            )
        return
    if columns & {*CONVERSATION_COLUMNS, text_field}:
        return
    advice = "rename or map the columns first"
    for needed, kind, what_to_do in _OTHER_TYPES:
        if needed <= columns:
            advice = f"it is of TRL's {kind} type: {what_to_do}"
            break
    raise ValueError(
        f"the {name} set has the columns {sorted(columns)}; expected 'prompt' and 'completion', or 'messages', or "
        f"'conversations', or {text_field!r}, or 'input_ids'; {advice}"
    )
