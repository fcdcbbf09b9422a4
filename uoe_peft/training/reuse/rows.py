"""The rows that a training run reads: how often, which of them, and as batches in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset

from uoe_peft.data import Batch, PairedDataset
from uoe_peft.data.pairing import retain_index
from uoe_peft.losses.answer_tokens import IGNORE_INDEX
from uoe_peft.training.config import UnlearningConfig

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The paired rows of a training run, role by role.

    Attributes:
        dataset: The pairs.
        args: How many steps or epochs, and how large a batch is; the Trainer may change them before it begins anew.
        collate: Rows of a role -> a batch on the model's device.
    """

    dataset: PairedDataset
    args: UnlearningConfig
    collate: Callable[[str, Sequence[Row]], Batch]

    @property
    def num_epochs(self) -> float:
        """How often training goes through the forget set."""
        if self.args.max_steps <= 0:
            return float(self.args.num_train_epochs)
        batches = len(self.dataset) / (self.args.train_batch_size * self.args.world_size)
        batches = math.floor(batches) if self.args.dataloader_drop_last else math.ceil(batches)
        return self.args.max_steps / max(1, math.ceil(batches / self.args.gradient_accumulation_steps))

    def of(self, role: str) -> Dataset:
        """The rows of a role that training will see, see `indices_in_training`."""
        return self.dataset.sets[role].select(indices_in_training(self.dataset, num_epochs=self.num_epochs)[role])

    @property
    def longest_answer(self) -> int:
        """Answer tokens of the row that has most."""
        labels = (row for rows in self.dataset.sets.values() for row in rows["labels"])
        return max(sum(label != IGNORE_INDEX for label in row) for row in labels)

    def batches(self, role: str, rows: Iterable[Row]) -> Iterator[Batch]:
        """Batches of rows of a role, as large as a training batch."""
        left = iter(rows)
        while chunk := list(islice(left, self.args.train_batch_size)):
            yield self.collate(role, chunk)

    def first_epoch(self, role: str) -> Iterator[Batch]:
        """The batches of the first epoch, in the order of the rows."""
        self.dataset.set_epoch(0)
        return self.batches(role, (self.dataset[index][role] for index in range(len(self.dataset))))


def rows_in_training(dataset: PairedDataset, *, num_epochs: float) -> Iterator[list[int]]:
    """Token ids of the rows that training will see in so many epochs, see `indices_in_training`."""
    for role, indices in indices_in_training(dataset, num_epochs=num_epochs).items():
        token_ids = dataset.sets[role]["input_ids"]
        yield from (token_ids[index] for index in indices)


def indices_in_training(dataset: PairedDataset, *, num_epochs: float) -> dict[str, Sequence[int]]:
    """The rows that training will see in so many epochs, by role: of a large retain set, only a part."""
    indices: dict[str, Sequence[int]] = {role: range(len(rows)) for role, rows in dataset.sets.items()}
    num_retain, seen = len(indices.get("retain", ())), math.ceil(num_epochs) * len(dataset)
    if seen < num_retain:
        sizes = {"num_forget": len(dataset), "num_retain": num_retain, "seed": dataset.seed}
        places = (divmod(place, len(dataset)) for place in range(seen))
        indices["retain"] = [retain_index(index, epoch=epoch, **sizes) for epoch, index in places]
    return indices
