"""Where results go: checked before hours of work, never written over without being asked."""

from __future__ import annotations

from pathlib import Path

from uoe_peft.checkpoints import why_not_writable


def check_file(path: str | None, *, overwrite: bool, option: str) -> None:
    """Make the folder of a file that is to be written, and see that it can be.

    Args:
        path: The file; None: nothing is to be written.
        overwrite: Whether it may exist already.
        option: Option that names it, for errors.

    Raises:
        ValueError: The file exists, or nothing can be written there.
    """
    if path is None:
        return
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"--{option} {path} is a folder; expected the name of a file")
    if target.exists() and not overwrite:
        raise ValueError(f"{path} exists; name another --{option}, or pass --overwrite")
    _check_writable(target.parent, option=option)


def check_folder(path: str, *, overwrite: bool, option: str, own: tuple[str, ...]) -> None:
    """Make a folder that results are to be written to, and see that they can be.

    Args:
        path: The folder.
        overwrite: Whether it may hold the result of an earlier run.
        option: Option that names it, for errors.
        own: Files that tell the result of an earlier run.

    Raises:
        ValueError: The folder holds an earlier result, is a file, or nothing can be written there.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--{option} {path} is a file; expected a folder")
    found = [name for name in own if (folder / name).exists()]
    if found and not overwrite:
        raise ValueError(f"{path} holds an earlier result ({found[0]}); name another --{option}, or pass --overwrite")
    _check_writable(folder, option=option)


def check_apart(path: str, *, adapter: str | None) -> None:
    """Keep a report, which shows questions and answers, out of the folder that is uploaded when an adapter is shared.

    Args:
        path: Folder for the report.
        adapter: The adapter's, or its name on the Hub; None: there is none.

    Raises:
        ValueError: The report would be in the adapter's folder.
    """
    if adapter is not None and Path(path).resolve().is_relative_to(Path(adapter).resolve()):
        raise ValueError(
            f"--output_dir {path} is in the adapter's folder, which is uploaded when it is shared; the report shows "
            "questions and answers: name another folder"
        )


def _check_writable(folder: Path, *, option: str) -> None:
    if reason := why_not_writable(folder):
        raise ValueError(f"cannot write to {folder}: {reason}; name another --{option}")
