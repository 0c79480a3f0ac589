"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(out: str | Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``out`` when the block ends, and is removed when the block fails.

    Args:
        out: where the folder is to be; its parents are made.
        force: replace a checkpoint that is already there, once the new one is complete.

    Yields:
        The folder to write into, beside ``out``.

    Raises:
        ValueError: there is something at ``out`` that may not be replaced; one sentence says what.

    """
    target = Path(os.path.abspath(out))
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial
        open_to_readers(partial)
        check_target(target, force)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_readers(folder: Path) -> None:
    """Give a folder and its plain files the usual permissions.

    Those who make temporary folders and weight files let nobody else in; a server may run as another user.
    Files with further links belong to somebody else and stay as they are.
    """
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
            file.chmod(0o666 & ~umask)


def check_target(target: Path, force: bool) -> None:
    """Refuse a place that is taken.

    An empty folder is not taken. Only what looks like a checkpoint is ever replaced, so that a wrong path
    beside ``--force`` costs nobody a home folder.

    Raises:
        ValueError: the place is taken.

    """
    if target.is_symlink():
        raise ValueError(f"{target} is a symbolic link; give another folder, or remove it")
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give another folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise ValueError(f"{target} exists and is not empty; give another folder, or --force to replace it")
    if not (target / "config.json").is_file():
        raise ValueError(
            f"{target} holds no checkpoint (no config.json) for --force to replace; give another folder"
        )


def _put_in_place(partial: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
        return
    # The old checkpoint moves aside first, and comes back if the new one cannot take its place.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    target.rename(aside)
    try:
        partial.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)
