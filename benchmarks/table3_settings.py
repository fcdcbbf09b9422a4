"""What `table3.py` compares, and what it can be told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NPO = {"forget_loss": "npo", "beta": 0.05, "retain_loss": "nll", "retain_weight": 8.0}
LOSSES: dict[str, dict[str, Any]] = {
    "NPO + refusals": {**NPO, "alternative_weight": 1.0},
    # What is kept, by the last layer's hidden states.
    "NPO, hidden": {
        **NPO,
        "alternative_weight": 1.0,
        "retain_loss": "relative_embed_diff",
        "retain_weight": 100.0,
    },
    "NPO": NPO,
    "GDiff": {"forget_loss": "grad_ascent", "retain_loss": "nll"},
    "RMU": {"forget_loss": "rmu", "retain_loss": "embed_diff", "retain_weight": 30.0},
    "GA": {"forget_loss": "grad_ascent", "retain_loss": "none"},
}
# By loss: all parameters, LoRA, experts. The first is what an earlier table of 120 steps chose for most, the second a
# neighbour on the side where most parts missed a limit or lost much.
RATES: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "NPO + refusals": ((1e-3, 5e-4), (3e-3, 1e-2), (5e-3, 2e-3)),
    "NPO, hidden": ((1e-3, 5e-4), (3e-3, 1e-2), (5e-3, 2e-3)),
    "NPO": ((1e-3, 3e-4), (3e-3, 1e-2), (5e-3, 2e-3)),
    "GDiff": ((1e-3, 3e-4), (3e-3, 1e-3), (3e-3, 1e-3)),
    "RMU": ((1e-3, 3e-4), (3e-3, 1e-2), (3e-3, 1e-2)),
    "GA": ((3e-4, 1e-4), (1e-3, 3e-4), (3e-3, 1e-3)),
}
UOE_MANY = "UOE, 8 experts"
PARTS = ("all", "LoRA", "ESFT", "random expert", "UOE gate", "UOE contrast", UOE_MANY)
EXPERTS_A_LAYER = 2  # of UOE_MANY: 8 in the 4 layers of the testbed
MAY_CHANGE = ("output_dir", "minutes", "seeds", "losses", "parts", "num_rates", "attacks")


@dataclass
class Table3Arguments:
    """Which model and sets, how long, how often."""

    output_dir: Path = field(default=Path("outputs/table3"), metadata={"help": "Where runs, tables and picture go."})
    minutes: float = field(default=120.0, metadata={"help": "No run begins after this; start again to go on."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of training and of the random expert."})
    losses: list[str] = field(default_factory=lambda: list(LOSSES), metadata={"help": "Columns of the table."})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": "What is trained."})
    num_rates: int = field(default=2, metadata={"help": "Learning rates tried, at most."})
    rate_factor: float = field(default=1.0, metadata={"help": "On all learning rates, for other models."})
    full_rate_factor: float = field(default=1.0, metadata={"help": "On those of all parameters, beside the other."})
    attacks: bool = field(default=True, metadata={"help": "Relearn and round what is tested; costs most of a run."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "None: the shipped testbed."})
    retrained_model: str | None = field(default=None, metadata={"help": "Twin that never saw the forget set."})
    forget_dataset: str | None = field(default=None, metadata={"help": "File, folder or name on the Hub."})
    retain_dataset: str | None = field(default=None, metadata={"help": "Likewise; half of it is held out."})
    dtype: str = field(default="float32", metadata={"help": "Of the models."})
    score_dtype: str | None = field(default=None, metadata={"help": "In which they are asked; needs --attacks false."})
    margin: float = field(default=0.05, metadata={"help": "Above the twin's forget ROUGE-L and probability."})
    steps: int = field(default=200, metadata={"help": "Of every run; the learning rate falls linearly to 0."})
    looks: list[int] = field(default_factory=lambda: [50, 100, 200], metadata={"help": "Steps to choose from."})
    strengths: list[float] = field(
        default_factory=lambda: [1.0, 0.85, 0.7, 0.55], metadata={"help": "Tried in this order, until a limit breaks."}
    )
    batch_size: int = field(default=8, metadata={"help": "Forget rows a step, and as many retain rows."})
    num_validation: list[int] = field(default_factory=lambda: [40, 60], metadata={"help": "Forget, retain rows asked."})
    num_test: list[int] = field(default_factory=lambda: [60, 120], metadata={"help": "The same of the test half."})
    num_relearned: int = field(default=40, metadata={"help": "Rows of the validation half that are relearned."})
    max_new_tokens: int = field(default=48, metadata={"help": "Where an answer is cut."})
    esft_share: float = field(default=0.2, metadata={"help": "Affinity p that ESFT's experts hold in each layer."})


def check_settings(args: Table3Arguments) -> None:
    """Write what all runs must have in common; or compare with what is written, so that no table mixes two.

    Raises:
        ValueError: Earlier runs in the folder had other settings; or attacked copies would be asked in another dtype.
    """
    if args.attacks and args.score_dtype not in (None, args.dtype):
        raise ValueError(f"attacks are scored in {args.dtype}; --score_dtype {args.score_dtype} needs --attacks false")
    settings = {name: value for name, value in asdict(args).items() if name not in MAY_CHANGE}
    settings |= {"losses": LOSSES, "experts_a_layer": EXPERTS_A_LAYER}
    path = args.output_dir / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    before = {"full_rate_factor": 1.0, "score_dtype": None, **before}  # what older runs were not told
    differing = sorted(name for name in settings if settings[name] != before.get(name))
    if differing:
        raise ValueError(f"the runs in {args.output_dir} had other {differing}; choose another --output_dir")
