"""Means over a stream of sequences, with everything that says how sure they are, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from uoe_peft.data.shares import Share


class SequenceMean:
    """Mean over sequences of a tensor, with bootstrap resamples of it and the means of two disjoint halves.

    A bootstrap resample draws each sequence a binomial number of times, which for many sequences is a Poisson number
    of mean 1 that can be drawn when the sequence passes by (the Poisson bootstrap). So nothing grows with the data.

    Args:
        shape: Of what each sequence contributes.
        num_resamples: Number of bootstrap resamples, R.
        seed: Of the resamples and of the halves.
    """

    def __init__(self, shape: Sequence[int], *, num_resamples: int, seed: int) -> None:
        self._shape = tuple(shape)
        size = math.prod(shape)
        self._generator = torch.Generator().manual_seed(seed)
        self.num_sequences = 0
        self._total = torch.zeros(size, dtype=torch.float64)
        self._half_total = torch.zeros(2, size, dtype=torch.float64)
        self._half_count = torch.zeros(2, dtype=torch.float64)
        self._resampled_total = torch.zeros(num_resamples, size)
        self._resampled_count = torch.zeros(num_resamples)

    def add(self, values: Tensor) -> None:
        """Take in a batch of sequences. Shape `(B, *shape)`, on the CPU."""
        batch_size = len(values)
        rows = values.reshape(batch_size, -1)
        half, draws = self._drawn(batch_size)
        self.num_sequences += batch_size
        self._total += rows.sum(dim=0, dtype=torch.float64)
        in_half = torch.nn.functional.one_hot(half, 2).T.double()  # (2, B)
        self._half_total.addmm_(in_half, rows.double())
        self._half_count += in_half.sum(dim=1)
        self._resampled_total.addmm_(draws, rows.float())
        self._resampled_count += draws.sum(dim=1)

    def leave_out(self, num_batches: int, batch_size: int) -> None:
        """Let batches pass by that another process takes in, which draws for them what it would draw here."""
        for _ in range(num_batches):
            self._drawn(batch_size)

    def put_together(self, share: Share) -> None:
        """Take in what other processes have taken in; afterwards all of them have the same."""
        self.num_sequences = sum(share.gathered(self.num_sequences))
        self._total, self._half_total, self._half_count, self._resampled_total, self._resampled_count = (
            share.total(own)
            for own in (
                self._total,
                self._half_total,
                self._half_count,
                self._resampled_total,
                self._resampled_count,
            )
        )

    def mean(self) -> Tensor:
        """Mean over all sequences. Shape `shape`, float32."""
        return (self._total / self.num_sequences).float().view(self._shape)

    def half_means(self) -> Tensor | None:
        """Means of two disjoint random halves, shape `(2, *shape)`; None where a half is empty."""
        if not self._half_count.all():
            return None
        return (self._half_total / self._half_count[:, None]).float().view(2, *self._shape)

    def resampled_means(self) -> Tensor | None:
        """Means of the bootstrap resamples, shape `(R, *shape)`; None for fewer than two sequences."""
        drawn = self._resampled_count > 0
        if self.num_sequences < 2 or not drawn.any():
            return None
        return (self._resampled_total[drawn] / self._resampled_count[drawn, None]).view(-1, *self._shape)

    def _drawn(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Which half each sequence of a batch is in, and how often it is in each resample. Shapes `(B,)`, `(R, B)`."""
        half = torch.randint(2, (batch_size,), generator=self._generator)
        ones = torch.ones(len(self._resampled_total), batch_size)
        return half, torch.poisson(ones, generator=self._generator)
