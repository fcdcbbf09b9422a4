"""One row of a data set -> its token ids, and which of them are the answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from uoe_peft.data.conversations import CONVERSATION_COLUMNS, answering_turns, read_messages
from uoe_peft.data.turns import ChatTemplate, common_prefix_length, find_answers
from uoe_peft.losses import IGNORE_INDEX

# What a set that is tokenised already may say of each token.
_TOKEN_COLUMNS = ("input_ids", "labels", "assistant_masks", "completion_mask", "attention_mask")


class EncodedRow(NamedTuple):
    """A row as token ids."""

    input_ids: list[int]
    labels: list[int]
    """-100 where a token is not part of an answer; as long as `input_ids`."""
    num_missing: int = 0
    """Answers of a conversation that are not in its rendering."""


def encode_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool = True,
    text_field: str = "text",
) -> EncodedRow:
    """Token ids of a row and its labels.

    Args:
        row: Any of the types that `tokenize_dataset` names.
        tokenizer: Whose ids, end-of-sequence token and chat template are used.
        completion_only: Whether prompt tokens get the label -100.
        text_field: Column of plain text.

    Raises:
        ValueError: Prompt and completion are of different kinds, labels and ids of different
            lengths, messages come without a chat template or hold more than text.
    """
    if "input_ids" in row:
        return _given_tokens(row, completion_only)
    conversation = next((row[name] for name in CONVERSATION_COLUMNS if row.get(name) is not None), None)
    if "prompt" in row and "completion" in row:
        encoded = _prompt_completion(row, tokenizer)
    elif conversation is not None:
        encoded = _conversation([], conversation, row, tokenizer)
    else:
        encoded = _text(row.get(text_field), tokenizer, name=text_field)
    return encoded if completion_only else encoded._replace(labels=list(encoded.input_ids))


def num_predicted(labels: Sequence[int]) -> int:
    """Number of answer tokens that a language model predicts.

    The first token of a sequence has nothing before it to be predicted from: it is not counted.
    """
    return sum(label != IGNORE_INDEX for label in labels[1:])


def example_id(input_ids: Sequence[int], labels: Sequence[int]) -> int:
    """What an example is found by: the same for the same tokens and answers, in every set, run and process.

    A hash of 63 bits: among a million examples two that differ share one with a probability of 5e-8.

    Args:
        input_ids: Token ids.
        labels: -100 where a token is not part of an answer; as long as `input_ids`.

    Returns:
        0 to 2**63 - 1.
    """
    values = np.asarray([*input_ids, *labels], dtype="<i8")
    return int.from_bytes(hashlib.blake2b(values.tobytes(), digest_size=8).digest(), "little") >> 1


def _given_tokens(row: Mapping[str, Any], completion_only: bool) -> EncodedRow:
    """A row that holds token ids; labels go before masks, as in TRL, and padding is taken out."""
    columns = {name: row[name] for name in _TOKEN_COLUMNS if row.get(name) is not None}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or "input_ids" not in columns:
        raise ValueError(f"a row holds {lengths or 'no'} tokens; expected input_ids, and all of its columns as long")
    input_ids, names = columns["input_ids"], ("assistant_masks", *(["completion_mask"] if completion_only else []))
    masks = [columns[name] for name in names if name in columns]
    masked = [i if all(counts) else IGNORE_INDEX for i, *counts in zip(input_ids, *masks, strict=True)]
    labels, attended = columns.get("labels", masked), columns.get("attention_mask", [1] * len(input_ids))
    kept = [place for place, is_token in enumerate(attended) if is_token]
    return EncodedRow([input_ids[place] for place in kept], [labels[place] for place in kept])


def _prompt_completion(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> EncodedRow:
    prompt, completion = row["prompt"], row["completion"]
    match prompt, completion:
        case str(), str():
            if not completion.strip():  # its end alone is no answer
                return _unanswered(_encode(tokenizer, prompt))
            input_ids = _encode(tokenizer, _with_eos(prompt + completion, tokenizer))
            # Tokens can merge across the boundary: the answer starts where the two differ.
            start = common_prefix_length(_encode(tokenizer, prompt), input_ids)
            return EncodedRow(input_ids, [IGNORE_INDEX] * start + input_ids[start:])
        case list(), list():
            return _conversation(prompt, completion, row, tokenizer)
        case _:
            raise ValueError(
                "'prompt' and 'completion' must both be strings or both be lists of messages, got "
                f"{type(prompt).__name__} and {type(completion).__name__}"
            )


def _conversation(
    asked: list[dict[str, Any]],
    answered: list[dict[str, Any]],
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> EncodedRow:
    """Messages of which only the later ones can be answers."""
    messages = read_messages([*asked, *answered])
    if not messages:  # many templates fail on none
        return _unanswered([])
    template = ChatTemplate(tokenizer, row.get("tools"), row.get("chat_template_kwargs") or {})
    input_ids, answers, num_missing = find_answers(messages, answering_turns(messages, start=len(asked)), template)
    labels = [i if is_answer else IGNORE_INDEX for i, is_answer in zip(input_ids, answers, strict=True)]
    return EncodedRow(input_ids, labels, num_missing)


def _text(text: Any, tokenizer: PreTrainedTokenizerBase, *, name: str) -> EncodedRow:
    if not isinstance(text, str):
        raise ValueError(f"column {name!r} must hold text, got {type(text).__name__} in a row")
    if not text.strip():
        return _unanswered(_encode(tokenizer, text))
    input_ids = _encode(tokenizer, _with_eos(text, tokenizer))
    return EncodedRow(input_ids, input_ids)


def _unanswered(input_ids: list[int]) -> EncodedRow:
    return EncodedRow(input_ids, [IGNORE_INDEX] * len(input_ids))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token
    return text if eos is None or text.endswith(eos) else text + eos
