"""A folder that is there as a whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uoe_peft.checkpoints import why_not_writable

_REMAINS = ".partial"


@contextmanager
def appearing_at_once(output: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends without an error, and vanishes otherwise.

    A process that is killed in the block leaves a hidden folder `.<name>.*.partial` beside `output`, nothing else; the
    next one that writes to `output` removes it.

    Args:
        output: The folder to make.
        num_bytes: How much will be written.

    Raises:
        ValueError: There is something at `output`, or nothing can be written there.
        OSError: The disk has less room than `num_bytes`.
    """
    check_vacant(output)
    check_writable(output.parent)
    with _held(output.parent, wait=True):  # nobody takes the new folder for remains before it is held, too
        _remove_remains(output)
        _check_space(output.parent, num_bytes)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=_REMAINS, dir=output.parent))
        handle = _hold(folder)
    try:
        folder.chmod(0o777 & ~_umask())
        yield folder
        sync(folder)
        os.replace(folder, output)  # over an empty folder, too
        sync(output.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def is_vacant(output: Path) -> bool:
    """Whether nothing is at `output`; an empty folder is nothing."""
    return not (output.is_symlink() or output.is_file() or (output.is_dir() and any(output.iterdir())))


def check_vacant(output: Path) -> None:
    """Raise ValueError if there is something at `output`."""
    if not is_vacant(output):
        raise ValueError(f"output {output} exists and is not an empty folder; choose another, or remove it")


def check_writable(folder: Path) -> None:
    """Make a folder, and see that files can be written there, before hours of work.

    Raises:
        ValueError: They cannot.
    """
    if reason := why_not_writable(folder):
        raise ValueError(f"cannot write to {folder}: {reason}; choose another folder")


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_remains(output: Path) -> None:
    """Remove what killed processes have left, which may be as large as what is to be written."""
    for folder in output.parent.iterdir():
        if folder.name.startswith(f".{output.name}.") and folder.name.endswith(_REMAINS) and folder.is_dir():
            with _held(folder) as is_free:
                if is_free:  # else a process that lives is at work there
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    handle = _hold(folder, wait=wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _hold(folder: Path, *, wait: bool = False) -> int | None:
    """A handle that tells others, until it is closed or the process ends, that a folder is in use.

    None where another process holds the folder and `wait` is False, or where there are no such locks.
    """
    if sys.platform == "win32":
        return None
    import fcntl  # Unix only

    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC, f"writing needs {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", str(folder)
        )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
