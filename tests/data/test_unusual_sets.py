"""Sets as people have them: half empty, padded, packed, formatted for another library, with columns of every kind."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from uoe_peft.data import tokenization, tokenize_dataset, tokenize_with_alternatives
from uoe_peft.data.encoding import EncodedRow

IDS = [[5, 6, 7, 8]]


def read(tokenizer: Any, columns: dict[str, Any], **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    rows = tokenize_dataset(Dataset.from_dict(columns), tokenizer, max_length=None, **options)
    return rows["input_ids"][:], rows["labels"][:]


# ---- Sets that are tokenised already ----


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"assistant_masks": [[0, 1, 0, 1]]}, [-100, 6, -100, 8]),
        ({"completion_mask": [[0, 0, 1, 1]], "assistant_masks": [[0, 1, 0, 1]]}, [-100, -100, -100, 8]),
        # As in TRL, labels say all there is to say.
        ({"labels": [[-100, 6, 7, 8]], "completion_mask": [[0, 0, 0, 1]]}, [-100, 6, 7, 8]),
    ],
)
def test_masks_say_which_tokens_count(tokenizer, columns, expected):
    assert read(tokenizer, {"input_ids": IDS, **columns}) == (IDS, [expected])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"labels": [[-100, 6, 7, -100]]}, [-100, 6, 7, -100]),
        ({"completion_mask": [[0, 0, 1, 1]]}, [5, 6, 7, 8]),
        ({"completion_mask": [[0, 0, 1, 1]], "assistant_masks": [[0, 1, 0, 1]]}, [-100, 6, -100, 8]),
    ],
)
def test_prompts_that_count_do_not_undo_labels(tokenizer, columns, expected):
    assert read(tokenizer, {"input_ids": IDS, **columns}, completion_only=False) == (IDS, [expected])


@pytest.mark.parametrize("attended", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
def test_padding_is_no_text(tokenizer, attended):
    padded = [9 if is_token else 0 for is_token in attended]
    assert read(tokenizer, {"input_ids": [padded], "attention_mask": [attended]}) == ([[9] * 3], [[9] * 3])
    labels = [[-100 if place == 2 else token for place, token in enumerate(padded)]]
    found = read(tokenizer, {"input_ids": [padded], "attention_mask": [attended], "labels": labels})
    assert found == ([[9] * 3], [[label for label in labels[0] if label != 0]])


@pytest.mark.parametrize("name", ["labels", "completion_mask", "assistant_masks", "attention_mask"])
def test_columns_of_another_length_are_refused(tokenizer, name):
    with pytest.raises(ValueError, match=rf"a row holds .*'input_ids': 4.*'{name}': 3"):
        read(tokenizer, {"input_ids": IDS, name: [[1, 1, 1]]})


def test_a_row_without_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match="a row holds no tokens"):
        read(tokenizer, {"input_ids": [[5, 6], None]})


@pytest.mark.parametrize("column", [{"position_ids": [[0, 1, 0, 1]]}, {"seq_lengths": [[2, 2]]}])
def test_packed_rows_are_refused(tokenizer, column):
    with pytest.raises(ValueError, match=rf"columns \['{next(iter(column))}'\], as packed rows have"):
        read(tokenizer, {"input_ids": IDS, **column})


# ---- Formats ----


@pytest.mark.parametrize("style", ["numpy", "torch", "pandas", "arrow"])
def test_the_format_of_a_set_does_not_matter(tokenizer, style):
    for columns in ({"prompt": ["who? ", "q"], "completion": ["Ada", "b"]}, {"input_ids": [[5, 6], [7, 8]]}):
        plain = Dataset.from_dict(columns)
        expected = tokenize_dataset(plain, tokenizer, max_length=None)
        found = tokenize_dataset(plain.with_format(style), tokenizer, max_length=None)
        assert found[:] == expected[:]  # lists of Python's integers, both
        assert isinstance(found[0]["id"], int) and isinstance(found[0]["input_ids"], list)


def test_columns_that_a_format_hides_are_read(tokenizer):
    rows = Dataset.from_dict({"prompt": ["who? "], "completion": ["Ada"]}).with_format("numpy", columns=["completion"])
    assert tokenize_dataset(rows, tokenizer, max_length=None)[0]["labels"][:5] == [-100] * 5


# ---- Rows that say nothing, or nothing that is text ----


@pytest.mark.parametrize("nothing", ["", "  "])
def test_an_empty_answer_is_none(tokenizer, nothing, caplog):
    """Its end would be all that is left to forget: the model would forget to stop."""
    pairs = Dataset.from_dict({"prompt": ["one? ", "two? "], "completion": [nothing, "b"]})
    texts = Dataset.from_dict({"text": [nothing, "two"]})
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": ""}]
    said = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "b"}]
    talks = Dataset.from_list([{"messages": turns}, {"messages": said}])
    tokenizer.bos_token = tokenizer.eos_token
    for rows in (pairs, texts, talks):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = tokenize_dataset(rows, tokenizer, max_length=None)
        assert len(found) == 1 and "left out 1 rows without an answer" in caplog.text
        assert "t" in tokenizer.convert_ids_to_tokens(found[0]["input_ids"])


def test_an_empty_alternative_takes_its_row_out_of_both_sets(tokenizer):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["x", "y"], "alternative": ["", "no"]})
    sets = tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=0)
    said = ["".join(tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])) for rows in sets]
    assert [len(rows) for rows in sets] == [1, 1] and said == ["by|end|", "bno|end|"]


def test_a_conversation_of_no_turns_is_left_out(tokenizer):
    tokenizer.chat_template = "{{ messages[0].role }}" + tokenizer.chat_template  # as many do
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = Dataset.from_list([{"messages": said}, {"messages": []}])
    assert len(tokenize_dataset(rows, tokenizer, max_length=None)) == 1


@pytest.mark.parametrize(("values", "kind"), [([None, "x"], "NoneType"), ([1, 2], "int"), ([["a"], ["b"]], "list")])
def test_what_is_no_text_is_named(tokenizer, values, kind):
    with pytest.raises(ValueError, match=rf"column 'text' must hold text, got {kind}"):
        read(tokenizer, {"text": values})


@pytest.mark.parametrize("label", [[["x"]], [[1.0, 2.0]], [3]])
def test_a_label_that_is_no_truth_value_is_another_column(tokenizer, label):
    assert read(tokenizer, {"prompt": ["q "], "completion": ["a"], "label": label})[1][0][:2] == [-100, -100]


def test_a_preference_beside_a_text_is_refused_too(tokenizer):
    with pytest.raises(ValueError, match="unpaired preference type"):
        read(tokenizer, {"prompt": ["q "], "completion": ["a"], "label": [True], "text": ["q a"]})


# ---- Alternatives ----


def test_prompts_count_beside_alternatives_where_they_are_asked_for(tokenizer):
    rows = Dataset.from_dict({"prompt": ["who? "], "completion": ["Ada"], "alternative": ["no"]})
    for completion_only, first in ((True, -100), (False, tokenizer.convert_tokens_to_ids("w"))):
        sets = tokenize_with_alternatives(rows, tokenizer, max_length=None, seed=0, completion_only=completion_only)
        assert [row["labels"][0] for rows in sets for row in rows] == [first, first]


# ---- Sets on disk, of which `datasets` keeps what was made of them ----


@pytest.fixture
def on_disk(tmp_path: Path) -> Dataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}? ", "completion": "a"}) + "\n" for i in range(3)))
    return load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")


def test_rows_that_an_earlier_version_encoded_are_encoded_anew(tokenizer, on_disk, monkeypatch):
    assert on_disk.cache_files
    tokenize_dataset(on_disk, tokenizer, max_length=None)
    monkeypatch.setattr(tokenization, "encode_row", lambda *args, **kwargs: EncodedRow([4, 5], [4, 5]))
    kept = tokenize_dataset(on_disk, tokenizer, max_length=None)
    assert len(kept[0]["input_ids"]) == 5  # the same version does not work twice
    monkeypatch.setattr(tokenization, "digest_of_sources", lambda folder: "of another version")
    assert tokenize_dataset(on_disk, tokenizer, max_length=None)[0]["input_ids"] == [4, 5]


def test_a_version_is_known_by_its_code(tmp_path):
    digests = set()
    for number, code in enumerate(("a = 1", "a = 2")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "encoding.py").write_text(code)
        digests.add(tokenization.digest_of_sources(tmp_path / str(number)))
    assert len(digests) == 2
