"""Which parts of a rendered conversation are answers.

Chat templates do not render a turn alone as they render it in a conversation: some drop the reasoning of earlier turns,
some close the last turn with another token, and most write something of their own before an answer. So nothing is
assumed about them. What a message says is found by rendering the conversation once more with other words in its place:
the answer is where the two renderings differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from uoe_peft.data.conversations import Message

Span = tuple[int, int]
"""First character, and the one after the last."""

Render = Callable[[Sequence[Message]], str]
"""A conversation as text."""

# What an assistant says, in the order in which templates write it; transformers gives reasoning all of these names.
_SAID = (("reasoning_content", "reasoning", "thinking"), ("content",), ("tool_calls",))
# What is not said in so many words: it stays when other words are put in their place.
_FIXED_KEYS = frozenset({"type", "id", "name", "role"})
_PRIVATE_USE = (0xE000, 0xF900)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with what a row of a data set hands to it.

    Attributes:
        tokenizer: Whose template it is.
        tools: Functions that the assistant may call, as JSON schemas, or as their JSON.
        options: Further arguments of the template.
    """

    tokenizer: PreTrainedTokenizerBase
    tools: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the data set is conversational but the tokenizer has no chat template; set "
                "tokenizer.chat_template, or turn the messages into 'prompt' and 'completion' strings"
            )

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as text."""
        text = self._apply(messages, tokenize=False)
        if not isinstance(text, str):
            raise TypeError(f"the chat template gave a {type(text).__name__}, expected text")
        return text

    def encode(self, messages: Sequence[Message], **options: Any) -> BatchEncoding:
        """A conversation as token ids."""
        encoding = self._apply(messages, tokenize=True, return_dict=True, **options)
        if not isinstance(encoding, BatchEncoding):
            raise TypeError(f"the chat template gave a {type(encoding).__name__}, expected token ids")
        return encoding

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says which parts are generated."""
        template = self.tokenizer.get_chat_template(tools=self._tools)
        return self.tokenizer.is_fast and _GENERATION.search(template) is not None

    @property
    def special_tokens(self) -> list[str]:
        """Tokens that stand for no text, the longest first."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return sorted({*self.tokenizer.all_special_tokens, *added}, key=len, reverse=True)

    @property
    def _tools(self) -> Any:
        return json.loads(self.tools) if isinstance(self.tools, str) else self.tools or None

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(list(messages), tools=self._tools, **options, **self.options)


def find_answers(
    messages: Sequence[Message], turns: Sequence[int], template: ChatTemplate
) -> tuple[list[int], list[bool], int]:
    """Token ids of a conversation, which of them are answers, and how many answers could not be found.

    An answer is what the messages of these turns say, and the token or text with which the template ends the turn.
    Where the template marks what is generated (`{% generation %}`), an answer lies within the marks and ends where they
    end; what the template writes inside them before the answer's own words is not part of it.

    Args:
        messages: The conversation.
        turns: Indices of the messages that are answers.
        template: Renders it.

    Returns:
        Ids, a flag for each of them, and the number of turns that say something which is not in the rendering.
    """
    text = template.render(messages)
    marked = template.marks_answers
    spans: list[Span] = []
    num_missing = 0
    for turn in turns:
        said = _said_in(messages, turn, text, template.render)
        if said and not marked:
            said[-1] = (said[-1][0], _turn_end(messages, turn, said[-1][1], text, template))
        num_missing += not said and any(messages[turn].get(name) for names in _SAID for name in names)
        spans += said
    input_ids, answers = _tokens(messages, text, spans, template)
    return input_ids, answers, num_missing


def _said_in(messages: Sequence[Message], turn: int, text: str, render: Render) -> list[Span]:
    """Where the rendering has what a message says: reasoning, content, and the arguments of calls, those it has."""
    spans = []
    # Nothing in the text can be mistaken for it, and what differs begins and ends with it.
    word = next(mark for mark in map(chr, range(*_PRIVATE_USE)) if mark not in text)
    for names in _SAID:
        said = {name: messages[turn][name] for name in names if messages[turn].get(name)}
        if not said:
            continue
        other = {**messages[turn], **{name: _reworded(value, word) for name, value in said.items()}}
        reworded = render([*messages[:turn], other, *messages[turn + 1 :]])
        # A text that is rendered twice would reach from the one place to the other, over all that is between.
        if reworded.count(word) == 1 or (word in reworded and not isinstance(said[next(iter(said))], str)):
            spans.append(_difference(text, reworded))
    return sorted(spans)


def _turn_end(messages: Sequence[Message], turn: int, end: int, text: str, template: ChatTemplate) -> int:
    """Where the turn ends that says its last words up to `end`: after what closes it at the end of a conversation."""
    if turn == len(messages) - 1:
        return len(text)
    until = messages[: turn + 1]
    alone = template.render(until)
    ends = [span[1] for span in _said_in(until, turn, alone, template.render)]
    closing = alone[max(ends, default=len(alone)) :]
    if text.startswith(closing, end):
        return end + len(closing)
    # The last turn of a conversation ends in another token than this one.
    return end + len(next((token for token in template.special_tokens if text.startswith(token, end)), ""))


def _tokens(
    messages: Sequence[Message], text: str, spans: Sequence[Span], template: ChatTemplate
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and whether each has a character of a span."""
    tokenizer = template.tokenizer
    if not tokenizer.is_fast:
        input_ids = list(template.encode(messages)["input_ids"])
        return input_ids, _without_offsets(input_ids, text, spans, tokenizer)
    encoding = template.encode(messages, tokenizer_kwargs={"return_offsets_mapping": True})
    places = encoding["offset_mapping"]
    answers = [any(first < end and last > start for start, end in spans) for first, last in places]
    if template.marks_answers:
        mask = template.encode(messages, return_assistant_tokens_mask=True)["assistant_masks"]
        answers = _within_marks(answers, [bool(marked) for marked in mask])
    return list(encoding["input_ids"]), answers


def _within_marks(answers: Sequence[bool], marked: Sequence[bool]) -> list[bool]:
    """Answers in each run of marked tokens, and what follows the last of them there; a run without any as it is."""
    kept = [False] * len(marked)
    start = 0
    while start < len(marked):
        end = start
        while end < len(marked) and marked[end]:
            end += 1
        found = [place for place in range(start, end) if answers[place]]
        for place in range(start, end):
            kept[place] = answers[place] or not found or place > found[-1]
        start = end + 1
    return kept


def _without_offsets(
    input_ids: Sequence[int], text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase
) -> list[bool]:
    """As `_tokens`, for tokenizers that do not know which characters a token stands for."""
    answers = [False] * len(input_ids)
    for span in spans:
        before = (tokenizer(text[:place], add_special_tokens=False)["input_ids"] for place in span)
        start, end = (common_prefix_length(list(ids), list(input_ids)) for ids in before)
        answers[start:end] = [True] * (end - start)
    return answers


def _reworded(value: Any, word: str) -> Any:
    """The same structure with a word in place of every text and number."""
    match value:
        case Mapping():
            return {key: entry if key in _FIXED_KEYS else _reworded(entry, word) for key, entry in value.items()}
        case list():
            return [_reworded(entry, word) for entry in value]
        case _:
            return word


def _difference(text: str, other: str) -> Span:
    """What of a text is not at the beginning or the end of another."""
    start = common_prefix_length(text, other)
    return start, len(text) - common_prefix_length(text[start:][::-1], other[start:][::-1])


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of characters or tokens with which both begin; of the same type, both."""
    low, high = 0, min(len(first), len(second))
    # By halves, since slices are compared much faster than items one by one.
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
