"""Samples are uniform, of the size asked for, and in batches of similar length, from any set that a trainer takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from tests.attribution.conftest import make_tokenizer
from uoe_peft.attribution.sampling import SampleBatches, counted_tokens, sample_batches


def sample(dataset: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> SampleBatches:
    defaults: dict[str, Any] = {"max_tokens": 10_000, "batch_size": 4, "max_length": None, "seed": 0}
    return sample_batches(dataset, tokenizer, **defaults | options)


def numbered(num_rows: int) -> Dataset:
    """Row i is the token i + 3, twice, so that a row can be told by its tokens."""
    return Dataset.from_dict({"input_ids": [[i + 3, i + 3] for i in range(num_rows)]})


def rows_of(batches: SampleBatches) -> list[int]:
    return [example["input_ids"][0] - 3 for example in batches.examples]


def test_a_set_that_fits_is_taken_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = sample(numbered(9), tokenizer)
    assert sorted(rows_of(batches)) == list(range(9))
    assert batches.num_tokens == 18
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 1]


def test_every_row_is_equally_likely(tokenizer: PreTrainedTokenizerFast) -> None:
    counts = Counter(
        row for seed in range(60) for row in rows_of(sample(numbered(10), tokenizer, max_tokens=6, seed=seed))
    )
    assert sum(counts.values()) == 60 * 3
    # 18 expected for each row, standard deviation about 3.5.
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 18 + 5 * 3.5


def test_the_budget_is_kept_but_one_row_is_always_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    assert sample(numbered(10), tokenizer, max_tokens=7).num_tokens == 6
    assert sample(numbered(10), tokenizer, max_tokens=1).num_tokens == 2


def test_a_stream_gives_the_same_kind_of_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = IterableDataset.from_generator(lambda: ({"input_ids": [i + 3, i + 3]} for i in range(12)))
    whole = sample(stream, tokenizer)
    assert sorted(rows_of(whole)) == list(range(12))
    parts = {tuple(rows_of(sample(stream, tokenizer, max_tokens=6, seed=seed))) for seed in range(5)}
    assert all(len(part) == 3 for part in parts)
    assert len(parts) > 1
    empty = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="forget set is empty"):
        sample(empty, tokenizer)


def test_batches_go_from_long_to_short(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["a" * n for n in (3, 14, 7, 1, 10, 5)]
    batches = sample(Dataset.from_dict({"text": texts}), tokenizer, batch_size=2)
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in batches]
    assert lengths == [[15, 11], [8, 6], [4, 2]]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_is_on_the_tokenizers_side_and_never_counts(padding_side: str) -> None:
    tokenizer = make_tokenizer(padding_side)
    (batch,) = sample(Dataset.from_dict({"text": ["abc", "a"]}), tokenizer)
    mask = counted_tokens(batch, include_prompt=True, name="forget")
    ends = [[True] * 4, [True, True, False, False]]
    assert mask.tolist() == (ends if padding_side == "right" else [row[::-1] for row in ends])


@pytest.mark.parametrize(
    "rows",
    [
        {"text": ["ab", "abc"]},
        {"prompt": ["q", "qq"], "completion": ["a", "aa"]},
        {"input_ids": [[5, 6, 7], [8, 9]]},
        {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [-100, 9]]},
    ],
)
def test_what_a_trainer_takes_is_taken(tokenizer: PreTrainedTokenizerFast, rows: dict[str, list[Any]]) -> None:
    assert len(sample(Dataset.from_dict(rows), tokenizer).examples) == 2


def test_conversations_are_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "abc"}]
    (batch,) = sample(Dataset.from_dict({"messages": [messages]}), tokenizer)
    assert counted_tokens(batch, include_prompt=True, name="forget").sum() == len("u:q?a:abc")
    assert counted_tokens(batch, include_prompt=False, name="forget").sum() < len("u:q?a:abc")


def test_rows_with_nothing_to_count_are_named() -> None:
    batch = {
        "input_ids": torch.ones(3, 2, dtype=torch.int64),
        "attention_mask": torch.tensor([[1, 1], [0, 0], [1, 0]]),
        "labels": torch.tensor([[-100, 1], [-100, -100], [-100, -100]]),
    }
    with pytest.raises(ValueError, match=r"rows \[1\] of a batch of the retain set have no token, only padding"):
        counted_tokens(batch, include_prompt=True, name="retain")
    with pytest.raises(ValueError, match=r"rows \[1, 2\] of a batch of the retain set have no answer token"):
        counted_tokens(batch, include_prompt=False, name="retain")


def test_the_fingerprint_is_of_the_tokens_and_the_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, 6, 7], [-100, 9]]}
    fingerprints = {
        sample(Dataset.from_dict(variant), tokenizer).fingerprint
        for variant in (rows, rows | {"labels": [[-100, -100, 7], [-100, 9]]}, {"input_ids": [[5, 6, 4], [8, 9]]})
    }
    assert len(fingerprints) == 3
    assert sample(Dataset.from_dict(rows), tokenizer).fingerprint in fingerprints


def test_other_types_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TypeError, match="got list"):
        sample([{"text": "abc"}], tokenizer)
