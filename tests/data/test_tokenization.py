import hashlib
import logging

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import PreTrainedTokenizerFast

from uoe_peft.data import IGNORE_INDEX, tokenize_dataset


def answers(tokenized: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What the labels spell, row by row."""
    return [
        "".join(tokenizer.convert_ids_to_tokens([i for i in row if i != IGNORE_INDEX])) for row in tokenized["labels"]
    ]


def texts(tokenized: Dataset, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(row)) for row in tokenized["input_ids"]]


def test_text_counts_every_token_and_gets_an_end(tokenizer):
    rows = Dataset.from_dict({"text": ["hello", "done|end|"]})
    tokenized = tokenize_dataset(rows, tokenizer, max_length=None)
    assert texts(tokenized, tokenizer) == ["hello|end|", "done|end|"]  # one end, not two
    assert tokenized["labels"][:] == tokenized["input_ids"][:]
    assert tokenized.column_names == ["input_ids", "labels", "id"]


def test_prompt_tokens_do_not_count(tokenizer):
    rows = Dataset.from_dict({"prompt": ["who? "], "completion": ["Ada"], "topic": ["x"]})
    tokenized = tokenize_dataset(rows, tokenizer, max_length=None)
    assert texts(tokenized, tokenizer) == ["who? Ada|end|"]
    assert answers(tokenized, tokenizer) == ["Ada|end|"]
    whole = tokenize_dataset(rows, tokenizer, max_length=None, completion_only=False)
    assert answers(whole, tokenizer) == ["who? Ada|end|"]


def test_answer_starts_where_tokens_merge_across_the_boundary(tokenizer):
    rows = Dataset.from_dict({"prompt": ["xa"], "completion": ["by"]})
    tokenized = tokenize_dataset(rows, tokenizer, max_length=None)
    assert tokenizer.convert_ids_to_tokens(tokenized["input_ids"][0]) == ["x", "ab", "y", "|end|"]
    assert answers(tokenized, tokenizer) == ["aby|end|"]


def test_chat_prompt_completion(tokenizer):
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "who?"}],
                "completion": [{"role": "assistant", "content": "Ada"}],
            }
        ]
    )
    tokenized = tokenize_dataset(rows, tokenizer, max_length=None)
    assert texts(tokenized, tokenizer) == ["<u>who?.<a>Ada."]
    assert answers(tokenized, tokenizer) == ["Ada."]


def test_only_the_assistants_turns_of_a_conversation_count(tokenizer):
    turns = [
        ("system", "s"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "3"),
        ("assistant", "4"),
    ]
    rows = Dataset.from_list([{"messages": [{"role": r, "content": c} for r, c in turns]}])
    tokenized = tokenize_dataset(rows, tokenizer, max_length=None)
    assert texts(tokenized, tokenizer) == ["<s>s.<u>one.<a>two.<u>3.<a>4."]
    assert answers(tokenized, tokenizer) == ["two.4."]
    whole = tokenize_dataset(rows, tokenizer, max_length=None, completion_only=False)
    assert whole["labels"][:] == whole["input_ids"][:]


def test_tokenised_sets_pass_through(tokenizer):
    plain = tokenize_dataset(Dataset.from_dict({"input_ids": [[5, 6, 7]]}), tokenizer, max_length=2)
    assert (plain[0]["input_ids"], plain[0]["labels"]) == ([5, 6], [5, 6])
    masked = Dataset.from_dict({"input_ids": [[5, 6, 7]], "completion_mask": [[0, 1, 1]]})
    assert tokenize_dataset(masked, tokenizer, max_length=None)[0]["labels"] == [-100, 6, 7]
    labelled = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, -100, 7]]})
    assert tokenize_dataset(labelled, tokenizer, max_length=None)[0]["labels"] == [-100, -100, 7]


def test_truncation_cuts_counts_and_leaves_out(tokenizer, caplog):
    rows = Dataset.from_dict({"prompt": ["q", "q", "a long prompt"], "completion": ["short", "rather long", "no"]})
    with caplog.at_level(logging.WARNING):
        tokenized = tokenize_dataset(rows, tokenizer, max_length=7, name="retain")
    assert answers(tokenized, tokenizer) == ["short|end|", "rather"]
    assert "left out 1 of 3 rows, whose answers lie beyond max_length=7" in caplog.text
    assert "cut the answers of 1 of 3 rows" in caplog.text
    kept_end = tokenize_dataset(rows, tokenizer, max_length=7, truncation_mode="keep_end")
    assert answers(kept_end, tokenizer) == ["short|end|", "r long|end|", "no|end|"]


def test_rows_agree_with_trl(tokenizer, tiny_sft_dataset):
    """Strings and chat pairs become exactly what TRL's own trainer would train on."""
    for rows in (
        Dataset.from_dict({"text": ["hello", "a much longer text that is cut"]}),
        Dataset.from_dict({"prompt": ["who? ", "xa"], "completion": ["Ada", "by the sea, cut"]}),
        Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": "who?"}],
                    "completion": [{"role": "assistant", "content": "Ada"}],
                }
            ]
        ),
    ):
        ours = tokenize_dataset(rows, tokenizer, max_length=14)
        theirs = tiny_sft_dataset(rows, tokenizer, max_length=14)
        assert ours["input_ids"][:] == theirs["input_ids"][:]
        assert ours["labels"][:] == theirs["labels"][:]


def test_streaming_needs_a_number_of_rows(tokenizer):
    stream = IterableDataset.from_generator(lambda: ({"text": f"row {i}"} for i in range(50)))
    with pytest.raises(ValueError, match=r"streaming.*take\(1000\)"):
        tokenize_dataset(stream, tokenizer, max_length=None)
    assert len(tokenize_dataset(stream, tokenizer, max_length=None, max_examples=3)) == 3


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (Dataset.from_dict({"text": []}), ValueError, "the forget set is empty"),
        (
            Dataset.from_dict({"question": ["q"], "answer": ["a"]}),
            ValueError,
            r"\['answer', 'quest",
        ),
        (
            Dataset.from_dict({"prompt": ["a very long prompt"], "completion": ["x"]}),
            ValueError,
            "all 1 answers lie beyond max_length=5",
        ),
        (
            Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, -100]]}),
            ValueError,
            "none of its 1 rows has an answer",
        ),
        (DatasetDict(train=Dataset.from_dict({"text": ["x"]})), TypeError, r'dataset\["train"\]'),
        ([{"text": "x"}], TypeError, "from_list"),
    ],
)
def test_unusable_sets_are_refused(tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        tokenize_dataset(rows, tokenizer, max_length=5)


SAID = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Ada"}]
TEXT = {"prompt": "who? ", "completion": "Ada"}
CHAT = {"prompt": SAID[:1], "completion": SAID[1:]}


@pytest.mark.parametrize("row", [{"text": "Ada"}, {"messages": SAID}, TEXT, CHAT, {**TEXT, "label": 3}])
def test_types_of_trl_that_sft_reads_are_read(tokenizer, row):
    rows = tokenize_dataset(Dataset.from_list([row]), tokenizer, max_length=None)
    assert "Ada" in answers(rows, tokenizer)[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "who? ", "chosen": "Ada", "rejected": "Bob"}, "TRL's preference type: forget_loss=.*dpo"),
        ({"chosen": SAID, "rejected": SAID}, "TRL's preference type"),
        ({**TEXT, "label": True}, "unpaired preference type, whose 'label' would be ignored.*remove_columns"),
        ({**CHAT, "label": False}, "unpaired preference type"),
        ({"prompt": "who? "}, "TRL's prompt-only type: add the answers"),
        ({"prompt": "2 + 2?", "completions": ["It", "is 4"], "labels": [True, True]}, "stepwise supervision type"),
    ],
)
def test_other_types_of_trl_are_refused_by_name(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        tokenize_dataset(Dataset.from_list([row]), tokenizer, max_length=None)


@pytest.mark.parametrize("column", ["images", "image", "videos", "audio"])
def test_sets_of_pictures_are_refused_by_name(tokenizer, column):
    rows = Dataset.from_dict({"text": ["x"], column: ["a.png"]})
    with pytest.raises(
        ValueError, match=rf"retain set has the columns \['{column}'\], and only text is read.*remove_co"
    ):
        tokenize_dataset(rows, tokenizer, max_length=None, name="retain")


def test_a_transform_is_refused(tokenizer):
    rows = Dataset.from_dict({"text": ["x"]}).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="with_transform"):
        tokenize_dataset(rows, tokenizer, max_length=None)


def test_several_processes_share_the_work(tokenizer, monkeypatch):
    asked = []
    plain = Dataset.map
    monkeypatch.setattr(
        Dataset, "map", lambda self, *a, num_proc=None, **options: asked.append(num_proc) or plain(self, *a, **options)
    )
    rows = Dataset.from_dict({"prompt": ["q "] * 3, "completion": ["a", "b", "c"]})
    for num_proc in (2, 8, None):
        tokenized = tokenize_dataset(rows, tokenizer, max_length=None, num_proc=num_proc)
        assert answers(tokenized, tokenizer) == ["a|end|", "b|end|", "c|end|"]
    assert asked == [2, 3, None]  # never more processes than rows


def test_two_processes_tokenise_alike(tokenizer):
    rows = Dataset.from_dict({"text": ["hello", "a", "bb"]})
    assert texts(tokenize_dataset(rows, tokenizer, max_length=None, num_proc=2), tokenizer) == [
        "hello|end|",
        "a|end|",
        "bb|end|",
    ]


def test_an_example_has_one_id_of_its_tokens_and_answers(tokenizer):
    rows = {"input_ids": [[5, 6], [5, 6], [5, 6], [5, 7]], "labels": [[5, 6], [-100, 6], [5, 6], [5, 7]]}
    ids = tokenize_dataset(Dataset.from_dict(rows), tokenizer, max_length=None)["id"][:]
    assert ids[0] == ids[2]
    assert len({*ids}) == 3
    assert all(0 <= value < 2**63 for value in ids)
    # blake2b of the little-endian tokens and labels, so it is the same in every process and on every machine.
    data = b"".join(value.to_bytes(8, "little", signed=True) for value in (5, 6, -100, 6))
    assert ids[1] == int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") // 2
    # A set that is handed in tokenised, and again, keeps its ids.
    again = tokenize_dataset(Dataset.from_dict(rows | {"id": [1, 2, 3, 4]}), tokenizer, max_length=None)
    assert again["id"][:] == ids


def test_unusable_arguments_are_refused(tokenizer):
    rows = Dataset.from_dict({"text": ["hello"]})
    with pytest.raises(ValueError, match="max_length must be None or at least 2"):
        tokenize_dataset(rows, tokenizer, max_length=1)
    with pytest.raises(ValueError, match="truncation_mode"):
        tokenize_dataset(rows, tokenizer, max_length=9, truncation_mode="middle")
    with pytest.raises(ValueError, match="max_examples"):
        tokenize_dataset(rows, tokenizer, max_length=9, max_examples=0)
    with pytest.raises(TypeError, match="processing_class"):
        tokenize_dataset(rows, object(), max_length=9)


def test_a_conversation_needs_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_dataset(rows, tokenizer, max_length=None)
