"""The published table of families says what the code finds."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.families import PAGE, describe, page, streams_by_kind
from tests.families import SUPPORTED


@pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in PAGE.read_text(encoding="utf-8"),
    reason="the table is of another version of transformers",
)
def test_the_page_of_families_is_up_to_date() -> None:
    # Whether families train and merge is what tests/tuner/test_families.py says, and that they stream what
    # tests/streaming/test_families.py says.
    rows = [describe(family, trains=True, merges=True, streams=streams_by_kind(family)) for family in SUPPORTED]
    assert PAGE.read_text(encoding="utf-8") == page(rows), "run `python -m benchmarks.families`"
