"""`uoe-peft STAGE ...`: one thin command a stage of the pipeline."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NoReturn

from uoe_peft import __version__
from uoe_peft.cli.help import help_of, path_of

STAGES = {
    "demo": "find the expert of a topic, unlearn it, switch it on and off, on a small bundled model",
    "attribute": "rank the experts of a model by how much they serve a forget set",
    "unlearn": "train an adapter that forgets a set",
    "solve": "solve for an adapter that forgets a set, without training",
    "evaluate": "report what an adapter has made a model forget, and what it cost",
    "report": "put many evaluations side by side",
    "card": "put a report's figures and your own words on an adapter's model card",
    "merge": "write a checkpoint with an adapter merged into it, without loading the model",
    "unmerge": "put the original slices back into such a checkpoint, bit for bit",
    "export": "write an adapter as plain LoRA, which loads without this package",
    "inspect": "say what is in an adapter: layers, experts, ranks, norms, origin",
    "app": "serve a page that answers a question with forgetting off and on, and shows its routing",
    "plan": "say how much memory and time unlearning takes, from a model's configuration alone",
    "factorize": "put the neurons of a dense model into groups, so that it has experts",
}

USAGE = "\n".join(
    [
        "usage: uoe-peft STAGE [--config FILE.yaml] [options]",
        "",
        "stages:",
        *(f"  {stage:10} {what}" for stage, what in STAGES.items()),
        "",
        "uoe-peft STAGE --help lists the options of a stage; uoe-peft --version",
    ]
)

# What wrong input raises; anything else is a fault of this package, or of one below it.
_OF_INPUT = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stage that the first argument names with the other arguments.

    Args:
        arguments: What stands after `uoe-peft`; None: what this process was called with.

    Raises:
        SystemExit: With code 0 after printing help, 1 where the stage failed, 2 for an unknown stage or option, 130
            where it was interrupted.
    """
    match list(sys.argv[1:] if arguments is None else arguments):
        case [] | ["-h" | "--help", *_]:
            _tell(USAGE)
        case ["--version", *_]:
            _tell(f"uoe-peft {__version__}")
        case [stage, *options] if stage in STAGES and {"-h", "--help"} & set(options):
            _tell(help_of(stage))
        case [stage, *options] if stage in STAGES:
            _run(stage, options)
        case [stage, *_]:
            said = f"unknown stage {stage!r}; use one of {', '.join(STAGES)}\nuoe-peft --help says what each does"
            print(said, file=sys.stderr)
            raise SystemExit(2)


def _tell(text: str) -> NoReturn:
    """Print and leave; a reader such as `head`, which has seen enough, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end has a place
    raise SystemExit(0)


def _run(stage: str, options: list[str]) -> None:
    shows_traceback = "--traceback" in options
    try:
        with warnings.catch_warnings(), _terminable():
            warnings.formatwarning = _one_line  # type: ignore[assignment]
            # PEFT 0.21 asks models for transformers' old name of activation checkpointing, each time it wraps one.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # Imported only now: help should not wait for torch.
            module = path_of(stage).removesuffix(".py").replace("/", ".")
            import_module(f"uoe_peft.{module}").run([word for word in options if word != "--traceback"])
    except KeyboardInterrupt as interrupt:
        print(f"\nuoe-peft {stage}: stopped. {interrupt}".rstrip(), file=sys.stderr)
        raise SystemExit(130) from interrupt
    except Exception as error:
        if shows_traceback:
            raise
        print(f"uoe-peft {stage}: {message_of(error)}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        warnings.formatwarning = _FORMAT


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, as schedulers send it, ends the stage as Ctrl-C does: what is temporary is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_FORMAT = warnings.formatwarning


def _one_line(message: Warning | str, *_: object) -> str:
    return f"warning: {message}\n"


def message_of(error: Exception) -> str:
    """An error in one or two lines."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 500 else f"{said[:500]}…"
    if isinstance(error, _OF_INPUT) and said:
        return said
    return f"{type(error).__name__}: {said}\n--traceback shows where this was raised"
