"""Conversations as data sets write them -> messages with a role and a content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

CONVERSATION_COLUMNS = ("messages", "conversations")
"""Columns that hold whole conversations; the second is ShareGPT's name."""

NOT_ANSWERING = frozenset({"user", "system", "developer", "tool", "function", "ipython", "observation", "documents"})
"""Roles whose words are never an answer."""

# Who speaks in ShareGPT's `from`; what it does not know keeps its name.
_SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def read_messages(turns: Sequence[Mapping[str, Any]] | str) -> list[Message]:
    """The messages of a conversation, in TRL's form or in ShareGPT's (`from` and `value`).

    Entries that are None are dropped: a table has them wherever another row has the key, and chat templates take a key
    that is there for one that was meant.

    Args:
        turns: Messages in their order.

    Raises:
        ValueError: They are no list of messages, a turn has no role, or says something that is not text.
    """
    if isinstance(turns, str) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(
            "a conversation must be a list of messages with 'role' and 'content', or 'from' and 'value', got "
            f"{str(turns)[:60]!r}; parse text with json.loads first"
        )
    messages = []
    for turn in turns:
        said = _without_none(turn)
        if "role" not in said and "from" in said:
            said["role"] = _SHARE_GPT.get(said["from"], said["from"])
            del said["from"]
        if "content" not in said and "value" in said:
            said["content"] = said.pop("value")
        if "role" not in said:
            raise ValueError(
                f"a message has the keys {sorted(turn)}; expected 'role' and 'content', or 'from' and 'value'"
            )
        _check_is_text(said.get("content"))
        messages.append(said)
    return messages


def answering_turns(messages: Sequence[Message], *, start: int = 0) -> list[int]:
    """Indices, from `start` on, of the messages that are answers."""
    return [i for i in range(start, len(messages)) if messages[i]["role"] not in NOT_ANSWERING]


def _without_none(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
        case list():
            return [_without_none(entry) for entry in value]
        case _:
            return value


def _check_is_text(content: Any) -> None:
    parts = content if isinstance(content, list) else []
    kinds = sorted({part.get("type", "text") for part in parts if isinstance(part, Mapping)} - {"text"})
    if kinds:
        raise ValueError(f"a message holds {kinds}, and only text is read; leave such messages out of the set")
