"""In a conversation the assistant's words are answers, whatever the chat template writes around them."""

from __future__ import annotations

import json
import logging
import re
from importlib.resources import files
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.chat_templates import SPECIAL_TOKENS, TEMPLATES
from uoe_peft.data import IGNORE_INDEX, tokenize_dataset
from uoe_peft.data.conversations import answering_turns, read_messages
from uoe_peft.data.turns import ChatTemplate, common_prefix_length, find_answers

# The second question repeats the first answer, and the second answer stands in both, and in most templates.
FIRST, SECOND = "Zoë is 2 years a user.", "user"
CONVERSATION = [
    {"role": "user", "content": "Who is ☃, user?"},
    {"role": "assistant", "content": FIRST},
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": SECOND},
]


def make_tokenizer(template: str, special_tokens: list[str]) -> PreTrainedTokenizerFast:
    """Bytes, and special tokens."""
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens})
    return tokenizer


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    return make_tokenizer(TEMPLATES[family], SPECIAL_TOKENS[family])


def answers(messages: Any, tokenizer: PreTrainedTokenizerFast, **columns: Any) -> list[str]:
    """What is answer, as text, one string for each unbroken run of tokens."""
    rows = Dataset.from_list([{"messages": messages, **columns}])
    (row,) = tokenize_dataset(rows, tokenizer, max_length=None)
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", [f"{FIRST}<|im_end|>\n", f"{SECOND}<|im_end|>\n"]),
        ("gpt_oss", [f"{FIRST}<|end|>", f"{SECOND}<|return|>"]),
        ("glm4", [FIRST, SECOND]),
        ("llama3", [f"{FIRST}<|eot_id|>", f"{SECOND}<|eot_id|>"]),
        ("mixtral", [f"{FIRST}</s>", f"{SECOND}</s>"]),
    ],
)
def test_every_answer_of_a_conversation_counts_and_nothing_else(family: str, expected: list[str]) -> None:
    tokenizer = tokenizer_of(family)
    assert answers(CONVERSATION, tokenizer) == expected
    # Prompt and completion are a conversation of which only the last turn is asked for.
    (row,) = tokenize_dataset(
        Dataset.from_list([{"prompt": CONVERSATION[:3], "completion": CONVERSATION[3:]}]), tokenizer, max_length=None
    )
    assert tokenizer.decode([i for i in row["labels"] if i != IGNORE_INDEX]) == expected[1]
    whole = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert row["input_ids"] == list(whole)


@pytest.mark.parametrize(
    ("family", "key", "expected"),
    [
        ("qwen3", "reasoning_content", [f"{FIRST}<|im_end|>\n", "why", f"{SECOND}<|im_end|>\n"]),
        ("gpt_oss", "thinking", [f"{FIRST}<|end|>", "why", f"{SECOND}<|return|>"]),
        ("glm4", "reasoning_content", [FIRST, "why", SECOND]),
    ],
)
def test_reasoning_that_is_rendered_is_said_too_without_the_marks_around_it(
    family: str, key: str, expected: list[str]
) -> None:
    messages = [dict(turn) for turn in CONVERSATION]
    messages[3][key] = "why"
    assert answers(messages, tokenizer_of(family)) == expected
    messages[1][key] = "because"  # dropped from earlier turns: there is nothing to count
    assert answers(messages, tokenizer_of(family)) == expected


def test_reasoning_inside_the_content_is_rendered_for_the_last_turn_alone() -> None:
    messages = [dict(turn) for turn in CONVERSATION]
    for turn in (1, 3):
        messages[turn]["content"] = "<think>\nhm\n</think>\n\n" + messages[turn]["content"]
    expected = [f"{FIRST}<|im_end|>\n", f"hm\n</think>\n\n{SECOND}<|im_end|>\n"]
    assert answers(messages, tokenizer_of("qwen3")) == expected


def test_white_space_that_a_template_drops_is_not_looked_for() -> None:
    messages = [{"role": "user", "content": " q \n"}, {"role": "assistant", "content": "\n\n a b \n"}]
    assert answers(messages, tokenizer_of("llama3")) == ["a b<|eot_id|>"]
    assert answers(messages, tokenizer_of("qwen3")) == ["\n\n a b \n<|im_end|>\n"]


def test_words_that_look_like_the_template_do_not_mislead() -> None:
    trap = "<|im_end|>\n<|im_start|>assistant\n<think>"
    messages = [
        {"role": "user", "content": trap},
        {"role": "assistant", "content": trap},
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": "\n"},
        {"role": "user", "content": "more"},
    ]
    assert answers(messages, tokenizer_of("qwen3")) == [f"{trap}<|im_end|>\n", "\n<|im_end|>\n"]


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_of_a_row_reach_its_template(as_text: bool) -> None:
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ mood }}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    )
    tokenizer = make_tokenizer(template, ["<|user|>", "<|assistant|>", "<|end|>"])
    tools: Any = [{"type": "function", "function": {"name": "find"}}]
    row = {"tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"mood": "calm"}}
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for messages in ({"messages": said}, {"prompt": said[:1], "completion": said[1:]}):
        (found,) = tokenize_dataset(Dataset.from_list([messages | row]), tokenizer, max_length=None)
        assert tokenizer.decode(found["input_ids"]) == "[find]calm<|user|>q<|end|><|assistant|>a<|end|>"
        assert answers(said, tokenizer, **row) == ["a<|end|>"]


def test_what_other_rows_have_is_not_there() -> None:
    """A table holds None for a key that another row has, and templates ask whether the key is there."""
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = Dataset.from_list([{"messages": said}, {"messages": [said[0], said[1] | {"thinking": "why"}]}])
    assert "thinking" in rows[0]["messages"][1]
    assert read_messages([{"role": None, "from": "human", "content": None, "value": "q"}]) == said[:1]
    tokenizer = tokenizer_of("gpt_oss")
    plain, _ = tokenize_dataset(rows, tokenizer, max_length=None)
    assert plain["input_ids"] == list(tokenizer.apply_chat_template(said, return_dict=True)["input_ids"])


def test_characters_that_stand_for_no_text_may_be_said_too() -> None:
    messages = [{"role": "user", "content": "\ue000?"}, {"role": "assistant", "content": "a\ue000\ue001b"}]
    assert answers(messages, tokenizer_of("qwen3")) == ["a\ue000\ue001b<|im_end|>\n"]


MARKED = """{%- for m in messages %}<|{{ m.role }}|>
{%- if m.role == 'assistant' %}{% generation %}<think></think>{{ m.content }}<|user|>{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""


def test_marks_of_a_template_say_where_a_turn_ends() -> None:
    tokenizer = make_tokenizer(MARKED, ["<|user|>", "<|assistant|>"])
    assert answers(CONVERSATION, tokenizer) == [f"{FIRST}<|user|>", f"{SECOND}<|user|>"]
    # Nothing that is said is rendered: the marks are all there is to go by.
    silent = make_tokenizer(MARKED.replace("{{ m.content }}<|user|>", "fixed"), ["<|user|>", "<|assistant|>"])
    assert answers(CONVERSATION, silent) == ["<think></think>fixed"] * 2


def test_calls_of_functions_are_said_too() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}"
        "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
    )
    tokenizer = make_tokenizer(template, ["<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"])
    call = {"type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "Rome"},
        {"role": "assistant", "content": "there"},
    ]
    # A data set gives every message the keys of all others, and None for those that it does not have.
    assert answers(messages, tokenizer) == ['Rome"}</call><|end|>', "there<|end|>"]


PUBLISHED = (
    "qwen3",
    "qwen3_training",
    "gptoss",
    "gptoss_training",
    "glm4moe",
    "glm4moe_training",
    "deepseekv3",
    "llama3_2",
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_as_they_were_published(name: str) -> None:
    """Whole templates, from TRL's collection; its variants for training mark what is generated, headers included."""
    path = files("trl").joinpath("chat_templates", f"{name}.jinja")
    if not path.is_file():
        pytest.skip(f"this version of trl has no {name}.jinja")
    template = path.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template, sorted(set(re.findall(r"<[|｜][^|｜<>\s]+[|｜]>", template))))
    input_ids, flags, num_missing = find_answers(CONVERSATION, [1, 3], ChatTemplate(tokenizer))
    said = tokenizer.decode([i for i, answer in zip(input_ids, flags, strict=True) if answer])
    # Each answer to its last letter, and after it nothing but what ends the turn.
    closing = r"(?:<[|｜](?!start|channel)[^<>]*[|｜]>|\s)*"
    assert re.fullmatch(f"{re.escape(FIRST)}{closing}{re.escape(SECOND)}{closing}", said), said
    assert num_missing == 0


def test_a_tokenizer_without_offsets_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in TEMPLATES:
        expected = answers(CONVERSATION, tokenizer_of(family))
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerFast, "is_fast", False)
            assert answers(CONVERSATION, tokenizer_of(family)) == expected


def test_answers_that_a_template_leaves_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    dropping = "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.content }}>{% endif %}{% endfor %}"
    twice = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ messages[1].content }}"
    for template, found in ((dropping, [f"{SECOND}>"]), (twice, [f"{SECOND}>{FIRST}"])):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert answers(CONVERSATION, make_tokenizer(template, [])) == found
        assert "forget set: the chat template leaves out 1 answers" in caplog.text


def test_a_turn_that_is_cut_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_of("mixtral")
    rows = Dataset.from_list([{"messages": CONVERSATION}])
    with caplog.at_level(logging.WARNING):
        tokenize_dataset(rows, tokenizer, max_length=45)
    assert "cut the answers of 1 of 1 rows" in caplog.text


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "", 0), ("abc", "abc", 3), ("abc", "abcd", 3), ("abd", "abc", 2), ("x", "y", 0), ([1, 2, 4], [1, 2], 2)],
)
def test_common_beginnings(first: Any, second: Any, length: int) -> None:
    assert common_prefix_length(first, second) == common_prefix_length(second, first) == length


def test_share_gpt_is_read() -> None:
    turns = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in CONVERSATION]
    assert read_messages([{"from": "system", "value": "s"}, *turns]) == [
        {"role": "system", "content": "s"},
        *CONVERSATION,
    ]
    tokenizer = tokenizer_of("llama3")
    (row,) = tokenize_dataset(Dataset.from_list([{"conversations": turns}]), tokenizer, max_length=None)
    assert tokenizer.decode([i for i in row["labels"] if i != IGNORE_INDEX]) == f"{FIRST}<|eot_id|>{SECOND}<|eot_id|>"


def test_who_answers() -> None:
    roles = ["system", "developer", "user", "assistant", "tool", "model"]
    assert answering_turns([{"role": role} for role in roles]) == [3, 5]
    assert answering_turns([{"role": role} for role in roles], start=4) == [5]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"speaker": "x", "text": "y"}, r"keys \['speaker', 'text'\]; expected 'role'"),
        ({"role": "user", "content": [{"type": "image", "url": "u"}]}, r"holds \['image'\], and only text"),
    ],
)
def test_what_is_not_a_message_of_text_is_refused(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_messages([turn])


@pytest.mark.parametrize("turns", ['[{"role": "user"}]', ["who?", "Ada"]])
def test_what_is_no_list_of_messages_is_named(turns: Any) -> None:
    with pytest.raises(ValueError, match=r"a conversation must be a list of messages.*json\.loads"):
        read_messages(turns)
