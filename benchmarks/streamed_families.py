"""Which families find the same streamed as in memory, bit for bit: hidden states, affinities, moments, trained adapter.

Usage: `python -m benchmarks.streamed_families [--families olmoe mixtral]` (from the repository's root; two or three
seconds of one core for each family). Families are built tiny, with random weights, and computed with in float32.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import logging

from tests.streaming.conftest import save_family
from tests.streaming.test_families import STREAMED, assert_every_bit
from tests.streaming.test_method import adapter, attributed, moments
from tests.training.conftest import make_sets, make_tokenizer
from uoe_peft.streaming import StreamedModel

COLUMNS = ("hidden states", "affinities", "moments", "adapter")


def same(compute: Callable[[Any], dict[str, Tensor]], resident: Any, streamed: Any) -> str:
    """Whether both models give the same bits; where the model in memory gives nothing, why."""
    try:
        expected = compute(resident)
    except Exception as error:
        return f"not in memory either: {type(error).__name__}"
    found = compute(streamed)
    is_same = expected.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())
    return "equal" if is_same else "differ"


def row(family: str, folder: Path) -> list[str]:
    """What a family's line says."""
    path, resident = save_family(family, folder)
    try:
        assert_every_bit(path, resident, family)
        said = ["equal"]
    except AssertionError:
        said = ["differ"]
    streamed: Any = StreamedModel.from_pretrained(path, show_progress=False)
    tokenizer, sets = make_tokenizer(), make_sets()
    said.append(same(lambda model: {"affinity": attributed(model, sets, tokenizer).affinity}, resident, streamed))
    if said[-1] != "equal":
        return [*said, "", ""]
    (target,) = attributed(resident, sets, tokenizer).top(1)
    said.append(same(lambda model: moments(model, sets[1], tokenizer, target), resident, streamed))
    return [*said, same(lambda model: adapter(model, sets, tokenizer, target, str(folder)), resident, streamed)]


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=STREAMED, default=STREAMED, metavar="FAMILY")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    print(f"| family | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    for family in options.families:
        with TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # the trainer's log
            said = row(family, Path(folder))
        print(f"| {family} | {' | '.join(said)} |", flush=True)


if __name__ == "__main__":
    main()
