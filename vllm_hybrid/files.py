"""Files that others made, read so that a broken one is named in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# How the text begins that git-LFS leaves in place of a file it has not fetched; the second is its old name.
_POINTER_STARTS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def check_present(file: Path) -> None:
    """See that a file is there, is no dangling link, has contents, and is the file itself.

    Raises:
        ValueError: it is not; one sentence says why.
        OSError: it cannot be opened.

    """
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{file} is a link to {file.readlink()}, which is not there; fetch it again")
    if not file.is_file():
        raise ValueError(f"{file} is missing; fetch it again")
    with file.open("rb") as opened:
        start = opened.read(max(map(len, _POINTER_STARTS)))
    if not start:
        raise ValueError(f"{file} is empty; fetch it again")
    if start.startswith(_POINTER_STARTS):
        raise ValueError(f"{file} is a git-LFS pointer, not the file itself; fetch it with git lfs pull")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: see :func:`check_present`; or it is not JSON.
        OSError: it cannot be opened.

    """
    check_present(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); repair it or fetch it again") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: see :func:`read_json`; or it holds something else.
        OSError: it cannot be opened.

    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; repair it or fetch it again")
    return content
