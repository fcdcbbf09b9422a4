"""`table3.py` on the natural domains, with the share of MMLU's questions whose right letter is found likeliest.

    python benchmarks/natural_table3.py --model_name_or_path outputs/natural/base \
        --retrained_model outputs/natural/retrained --forget_dataset outputs/natural/forget.jsonl \
        --retain_dataset outputs/natural/retain.jsonl --output_dir outputs/table3_natural

All options are those of `table3.py`. Every model that is scored on the test half is asked its questions once more for
the letter; `options.md` then stands beside the usual tables. Chance is 0.25.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import table3
import table3_ground
from natural_scores import option_accuracy
from table3_report import CHOICES, Table, read_table
from table3_settings import Table3Arguments
from transformers import HfArgumentParser

NAMES = {role: f"options {role}" for role in ("forget", "retain")}
plain_scores = table3_ground.scores


def main() -> None:
    """Run Table 3 with one more score, and write that score's table."""
    (args,) = HfArgumentParser(Table3Arguments).parse_args_into_dataclasses()
    table3_ground.scores = scores  # what the test half is scored by; looks keep the plain ones
    table3.main()
    text = "\n".join(options(read_table(args.output_dir / "table3.json")))
    (args.output_dir / "options.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


def scores(ground: table3_ground.Ground, model: Any, half: str) -> dict[str, float]:
    """The scores of Table 3 and the share of right letters of each role."""
    asked = ground.asked[half]
    letters = {name: option_accuracy(model, ground.tokenizer, asked[role]) for role, name in NAMES.items()}
    return {**plain_scores(ground, model, half), **letters}


def options(table: Table) -> Iterator[str]:
    """One row a part and choice, for each loss: share of right letters on forget rows / on retain rows."""
    yield f"| trained | choice | {' | '.join(table.losses)} |"
    yield "|---" * (len(table.losses) + 2) + "|"
    for name, found in table.references.items():
        yield f"| {name} | | {' | '.join([_pair(found)] * len(table.losses))} |"
    for choice in CHOICES:
        for part in table.parts:
            row = [cell.test if cell else {} for cell in table.row(part, choice=choice)]
            if any(row):
                yield f"| {part} | {choice} | {' | '.join(map(_pair, row))} |"


def _pair(found: dict[str, float]) -> str:
    return " / ".join(f"{found[name]:.2f}" for name in NAMES.values() if name in found)


if __name__ == "__main__":
    main()
