"""One row of a TRL data set -> its token ids, and which of them are the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from uoe_peft.losses import IGNORE_INDEX


def encode_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only: bool = True,
    text_field: str = "text",
) -> tuple[list[int], list[int]]:
    """Token ids of a row and its labels: -100 where a token is not part of an answer.

    Args:
        row: Any of TRL's types, see `tokenize_dataset`.
        tokenizer: Whose ids, end-of-sequence token and chat template are used.
        completion_only: Whether prompt tokens get the label -100.
        text_field: Column of plain text.

    Returns:
        Ids and labels, lists of equal length.

    Raises:
        ValueError: Prompt and completion are of different kinds, labels and ids of different
            lengths, or messages come without a chat template.
    """
    if "input_ids" in row:
        return list(row["input_ids"]), _given_labels(row, completion_only)
    if "prompt" in row and "completion" in row:
        input_ids, labels = _prompt_completion(row, tokenizer)
    elif "messages" in row:
        input_ids, labels = _conversation(row, tokenizer)
    else:
        input_ids = labels = _encode(tokenizer, _with_eos(row[text_field], tokenizer))
    return input_ids, labels if completion_only else list(input_ids)


def num_predicted(labels: Sequence[int]) -> int:
    """Number of answer tokens that a language model predicts.

    The first token of a sequence has nothing before it to be predicted from: it is not counted.
    """
    return sum(label != IGNORE_INDEX for label in labels[1:])


def _given_labels(row: Mapping[str, Any], completion_only: bool) -> list[int]:
    input_ids = row["input_ids"]
    labels = row.get("labels")
    mask = row.get("completion_mask") if completion_only else None
    if labels is None and mask is None:
        labels = input_ids
    elif labels is None:
        labels = _mask_labels(input_ids, mask or ())
    if len(labels) != len(input_ids):
        raise ValueError(f"a row has {len(input_ids)} input_ids but {len(labels)} labels")
    return list(labels)


def _mask_labels(input_ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    return [i if m else IGNORE_INDEX for i, m in zip(input_ids, mask, strict=True)]


def _prompt_completion(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    prompt, completion = row["prompt"], row["completion"]
    match prompt, completion:
        case str(), str():
            prompt_ids = _encode(tokenizer, prompt)
            input_ids = _encode(tokenizer, _with_eos(prompt + completion, tokenizer))
        case list(), list():
            prompt_ids = _render(prompt, row, tokenizer, add_generation_prompt=True)
            input_ids = _render(prompt + completion, row, tokenizer)
        case _:
            raise ValueError(
                "'prompt' and 'completion' must both be strings or both be lists of messages, got "
                f"{type(prompt).__name__} and {type(completion).__name__}"
            )
    # Tokens can merge across the boundary, and a template can render a prompt differently when an
    # answer follows: the answer starts where the two differ.
    start = _common_prefix_length(prompt_ids, input_ids)
    return input_ids, [IGNORE_INDEX] * start + input_ids[start:]


def _conversation(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    messages = row["messages"]
    input_ids = _render(messages, row, tokenizer)
    labels = [IGNORE_INDEX] * len(input_ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = 0
        if turn > 0:
            before = _render(messages[:turn], row, tokenizer, add_generation_prompt=True)
            start = _common_prefix_length(before, input_ids)
        end = _common_prefix_length(_render(messages[: turn + 1], row, tokenizer), input_ids)
        labels[start:end] = input_ids[start:end]
    return input_ids, labels


def _render(
    messages: list[dict[str, Any]],
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValueError(
            "the data set is conversational but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or turn the messages into 'prompt' and 'completion' strings"
        )
    tools = row.get("tools") or None
    encoding = tokenizer.apply_chat_template(
        messages,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        **(row.get("chat_template_kwargs") or {}),
    )
    if not isinstance(encoding, BatchEncoding):
        raise TypeError(f"the chat template gave a {type(encoding).__name__}, expected token ids")
    return list(encoding["input_ids"])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    eos = tokenizer.eos_token
    return text if eos is None or text.endswith(eos) else text + eos


def _common_prefix_length(ids: Sequence[int], other_ids: Sequence[int]) -> int:
    for position, (i, j) in enumerate(zip(ids, other_ids, strict=False)):
        if i != j:
            return position
    return min(len(ids), len(other_ids))
