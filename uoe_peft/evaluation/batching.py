"""Rows of similar length, together, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(lengths: Sequence[int], *, batch_size: int) -> Iterator[list[int]]:
    """Every row once, in batches of similar length; the longest first, so that too little memory shows at once.

    Args:
        lengths: Length of each row.
        batch_size: Rows a batch, at least 1; the last batch may have fewer.

    Yields:
        Indices into `lengths`.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
