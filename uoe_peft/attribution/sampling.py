"""A forget or retain set -> a uniform sample of tokenised examples -> batches of similar length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from uoe_peft.data import IGNORE_INDEX, Batch, collate, tokenize_dataset
from uoe_peft.data.shares import Share
from uoe_peft.data.tokenization import ProcessingClass, text_tokenizer

Example = dict[str, list[int]]

# Rows read from a stream before one is drawn: a stream cannot be sampled uniformly without reading it to its end.
_STREAM_BUFFER = 10_000
# Rows tokenised at a time: a set may be far larger than the sample that is taken of it.
_CHUNK = 2_048


@dataclass(frozen=True, eq=False)
class SampleBatches:
    """Batches of a sample, the longest examples first, collated anew in each pass over them.

    Attributes:
        examples: Tokenised examples with `input_ids` and `labels`, sorted by falling length.
        batch_size: Examples in a batch, B.
        pad_token_id: Fills short rows; never counts.
        padding_side: "right" or "left".
    """

    examples: Sequence[Example]
    batch_size: int
    pad_token_id: int
    padding_side: str = "right"

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.examples), self.batch_size):
            rows = self.examples[start : start + self.batch_size]
            yield collate(rows, pad_token_id=self.pad_token_id, padding_side=self.padding_side)

    def part(self, share: Share) -> SampleBatches:
        """Those of the batches that one process reads."""
        starts = range(share.rank * self.batch_size, len(self.examples), share.count * self.batch_size)
        return replace(
            self, examples=[row for start in starts for row in self.examples[start : start + self.batch_size]]
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples, prompts included, padding not."""
        return sum(len(example["input_ids"]) for example in self.examples)

    @property
    def fingerprint(self) -> str:
        """Hash of the sampled tokens and of which of them are answers, 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray(example["input_ids"] + [-1] + example["labels"] + [-1], dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]


def sample_batches(
    dataset: Dataset | IterableDataset,
    processing_class: ProcessingClass,
    *,
    max_tokens: int,
    batch_size: int,
    max_length: int | None,
    seed: int,
    name: str = "forget",
) -> SampleBatches:
    """Batches of examples drawn uniformly from a set until `max_tokens` is reached.

    Args:
        dataset: As in `tokenize_dataset`. A streaming set is drawn from a shuffled buffer of 10,000 rows.
        processing_class: Tokenizer, or a processor that holds one.
        max_tokens: Size of the sample in tokens, at most; one example is always taken.
        batch_size: Examples in a batch.
        max_length: Longest example in tokens; None for no limit.
        seed: Of the draw.
        name: What messages call this set.

    Raises:
        TypeError: `dataset` is not a `Dataset` or `IterableDataset`.
        ValueError: The set is empty or has no usable columns or answers; `max_tokens` or `batch_size` is not positive.
    """
    for option, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    examples: list[Example] = []
    num_tokens = 0
    for example in _tokenised(dataset, processing_class, max_length=max_length, seed=seed, name=name):
        num_tokens += len(example["input_ids"])
        if num_tokens > max_tokens and examples:
            break
        examples.append(example)
    if not examples:
        raise ValueError(f"the {name} set is empty; expected at least one row")
    tokenizer = text_tokenizer(processing_class)
    padding = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if isinstance(token, int))
    return SampleBatches(
        # The longest first: if memory does not suffice, it is known at once.
        examples=sorted(examples, key=lambda example: -len(example["input_ids"])),
        batch_size=batch_size,
        pad_token_id=next(padding),
        padding_side=tokenizer.padding_side,
    )


def counted_tokens(batch: Batch, *, include_prompt: bool, name: str) -> Tensor:
    """Which tokens of a batch count: never padding, and prompts only if asked for. Shape `(B, S)`, bool.

    Raises:
        ValueError: A row has no token that counts.
    """
    mask = batch["attention_mask"].bool()
    if not include_prompt:
        mask = mask & (batch["labels"] != IGNORE_INDEX)
    empty = torch.where(~mask.any(dim=1))[0].tolist()
    if empty:
        kind = "token" if include_prompt else "answer token"
        raise ValueError(f"rows {empty} of a batch of the {name} set have no {kind}, only padding; drop them")
    return mask


def _tokenised(
    dataset: Dataset | IterableDataset,
    processing_class: ProcessingClass,
    *,
    max_length: int | None,
    seed: int,
    name: str,
) -> Iterator[Example]:
    for chunk in _shuffled_chunks(dataset, seed=seed):
        yield from tokenize_dataset(chunk, processing_class, max_length=max_length, name=name)


def _shuffled_chunks(dataset: Dataset | IterableDataset, *, seed: int) -> Iterator[Dataset]:
    match dataset:
        case IterableDataset():
            rows = iter(dataset.shuffle(seed=seed, buffer_size=_STREAM_BUFFER))
            while chunk := list(islice(rows, _CHUNK)):
                yield Dataset.from_list(chunk)
        case Dataset() if len(dataset) > 0:
            order = np.random.default_rng(seed).permutation(len(dataset))
            for start in range(0, len(order), _CHUNK):
                yield dataset.select(order[start : start + _CHUNK])
        case _:
            yield dataset  # tokenize_dataset says what is wrong with it
