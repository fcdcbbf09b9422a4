"""Forget and retain examples, side by side.

Each forget example is trained together with a retain example. Which one depends on nothing but
(seed, epoch, index): the same pairs come out on one process or on eight, with or without
data-loading workers, and after resuming in the middle of an epoch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

PairedRow = dict[str, dict[str, Any]]


def retain_index(index: int, *, epoch: int, num_forget: int, num_retain: int, seed: int) -> int:
    """The retain example that belongs to forget example `index` in `epoch`.

    The retain set is an endless stream of passes, each shuffled anew; the answer is what stands at
    position `epoch * num_forget + index` of that stream. So over training every retain example
    comes up equally often (to within one), whichever set is larger, and in whatever order the
    forget examples are drawn.

    Args:
        index: Forget example, 0 to `num_forget - 1`.
        epoch: From 0.
        num_forget: Size of the forget set.
        num_retain: Size of the retain set.
        seed: Not negative.

    Returns:
        0 to `num_retain - 1`.

    Raises:
        IndexError: `index` is outside the forget set.
    """
    if not 0 <= index < num_forget:
        raise IndexError(f"index {index} is outside the forget set; use 0 to {num_forget - 1}")
    which_pass, place = divmod(epoch * num_forget + index, num_retain)
    return int(_shuffled(num_retain, seed, which_pass)[place])


@lru_cache(maxsize=64)
def _shuffled(size: int, seed: int, which_pass: int) -> np.ndarray:
    return np.random.default_rng((seed, which_pass)).permutation(size)


class PairedDataset(TorchDataset[PairedRow]):
    """The forget set, each example with its retain example of the current epoch.

    Row `i` is `{"forget": example i, "retain": its partner}`, and any further column set in `extra`
    under its own name; each example also carries its `index` in its own set, and each forget example
    the `seed` of whatever is drawn at random for it in the current epoch, which depends on the `id`
    that it got when it was tokenised, and not on its place in the set.

    Args:
        forget: Tokenised forget set, see `tokenize_dataset`; its size is this data set's size.
        retain: Tokenised retain set, or None.
        seed: Of the pairing.
        extra: Further sets, row by row aligned with the forget set, e.g. alternative answers.

    Raises:
        ValueError: A set is empty, or an extra set is not as long as the forget set.
    """

    def __init__(
        self,
        forget: Dataset,
        retain: Dataset | None = None,
        *,
        seed: int = 0,
        extra: dict[str, Dataset] | None = None,
    ) -> None:
        self.forget, self.retain, self.seed = forget, retain, seed
        self.extra = extra or {}
        if len(forget) == 0 or (retain is not None and len(retain) == 0):
            raise ValueError("a forget and a retain set need at least one example each")
        for role, dataset in self.extra.items():
            if len(dataset) != len(forget):
                raise ValueError(
                    f"the {role!r} set has {len(dataset)} rows, the forget set {len(forget)}; "
                    "they must be aligned row by row"
                )
        # Shared memory: data-loading workers that outlive an epoch see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose pairs are handed out."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Hand out the pairs of `epoch` from now on."""
        self._epoch.fill_(epoch)

    @property
    def sets(self) -> dict[str, Dataset]:
        """The sets by role: "forget", "retain" where there is one, and those of `extra`."""
        retain = {} if self.retain is None else {"retain": self.retain}
        return {"forget": self.forget, **retain, **self.extra}

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index: int) -> PairedRow:
        forget = self.forget[index]
        row: PairedRow = {"forget": {**forget, "index": index, "seed": self._seed_of(forget.get("id", index))}}
        for role, dataset in self.extra.items():
            row[role] = {**dataset[index], "index": index}
        if self.retain is not None:
            partner = retain_index(
                index,
                epoch=self.epoch,
                num_forget=len(self.forget),
                num_retain=len(self.retain),
                seed=self.seed,
            )
            row["retain"] = {**self.retain[partner], "index": partner}
        return row

    def _seed_of(self, example_id: int) -> int:
        return int(np.random.SeedSequence((self.seed, self.epoch, example_id)).generate_state(1)[0])
