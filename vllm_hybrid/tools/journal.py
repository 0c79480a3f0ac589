"""Results of long work, kept line by line, so that work that was cut off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Named results in a file of JSON lines, one written as soon as it is known.

    The first line says what the work is; a file that says something else is begun anew, and so is one that
    cannot be read. A line that was cut off in writing is left out.
    """

    def __init__(self, file: str | Path | None, work: Any) -> None:
        """Open or begin a journal.

        Args:
            file: where it lies; None keeps nothing.
            work: what the results depend on, as plain JSON.

        Raises:
            OSError: the file cannot be written.

        """
        self.path = None if file is None else Path(file)
        self._known: dict[str, Any] = {}
        if self.path is None:
            return
        first = json.dumps({"work": work}, sort_keys=True)
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        if lines and lines[0] == first:
            self._known = _entries(lines[1:])
        # Written whole and put in place, so that a torn last line does not spoil the next one.
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(line + "\n" for line in [first, *map(_line, self._known.items())]))
        os.replace(part, self.path)

    @property
    def keeps(self) -> bool:
        """Whether results are kept at all."""
        return self.path is not None

    def __len__(self) -> int:
        """How many results are known."""
        return len(self._known)

    def result(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result by name: as it was found earlier, else computed now and kept."""
        if name not in self._known:
            self._known[name] = compute()
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(_line((name, self._known[name])) + "\n")
        return self._known[name]

    def remove(self) -> None:
        """Forget all results: the work is done."""
        self._known = {}
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _line(entry: tuple[str, Any]) -> str:
    return json.dumps(entry)


def _entries(lines: list[str]) -> dict[str, Any]:
    known = {}
    for line in lines:
        try:
            name, value = json.loads(line)
        except (ValueError, TypeError):
            continue
        known[name] = value
    return known
