"""`uoe-peft STAGE ...`: one thin command a stage of the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

STAGES = {
    "demo": "find the expert of a topic, unlearn it, switch it on and off, on a small bundled model",
    "attribute": "rank the experts of a model by how much they serve a forget set",
    "unlearn": "train an adapter that forgets a set",
    "solve": "solve for an adapter that forgets a set, without training",
    "evaluate": "report what an adapter has made a model forget, and what it cost",
    "report": "put many evaluations side by side",
    "merge": "write a checkpoint with an adapter merged into it, without loading the model",
    "unmerge": "put the original slices back into such a checkpoint, bit for bit",
    "export": "write an adapter as plain LoRA, which loads without this package",
    "inspect": "say what is in an adapter: layers, experts, ranks, norms, origin",
}

USAGE = "\n".join(
    [
        "usage: uoe-peft STAGE [--config FILE.yaml] [options]",
        "",
        "stages:",
        *(f"  {stage:10} {what}" for stage, what in STAGES.items()),
        "",
        "uoe-peft STAGE --help lists the options of a stage",
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage that the first argument names with the other arguments.

    Args:
        arguments: What stands after `uoe-peft`; None: what this process was called with.

    Raises:
        SystemExit: With code 0 after printing help, 2 for an unknown stage.
    """
    match list(sys.argv[1:] if arguments is None else arguments):
        case [] | ["-h" | "--help", *_]:
            print(USAGE)
            raise SystemExit(0)
        case [stage, *options] if stage in STAGES:
            # Imported only now: help should not wait for torch.
            import_module(f"uoe_peft.cli.{stage}").run(options)
        case [stage, *_]:
            print(f"unknown stage {stage!r}; use one of {', '.join(STAGES)}\n\n{USAGE}", file=sys.stderr)
            raise SystemExit(2)
