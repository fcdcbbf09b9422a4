"""Work in a copy of this process, which may be killed at any step that touches files, or not be allowed to write."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.remove",
    "os.rmdir",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.truncate",
)


def forked(work: Callable[[], object]) -> int:
    """The exit code of a copy of this process that does `work`; negative for the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_changes_below(folder: Path, act: Callable[[str], None]) -> None:
    """Call `act` with what is about to happen to files in a folder, in this process, from now on and for good."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            changes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, changes = (args[0] if args else None), event in _CHANGES
        paths = args[:2] if event in ("os.rename", "os.link") else (path,)
        inside = any(isinstance(p, str | Path) and Path(p).is_relative_to(folder) for p in paths)
        if changes and inside:
            act(f"{event} {path}")

    sys.addaudithook(hook)


def dies_at(step: int, folder: Path) -> None:
    """Let this process be killed just before the change of that number, counted from 1, to files in a folder."""
    seen = 0

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)

    on_changes_below(folder, count)
