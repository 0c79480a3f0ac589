"""Which rows have pictures that cannot be read, found before a server is asked about them.

A server would refuse such a row each time it is asked. Pillow reads pictures here, as it does there.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing

from PIL import Image

from vllm_hybrid.errors import one_line
from vllm_hybrid.evaluation.tsv import Data, Row
from vllm_hybrid.tools.threads import in_threads


class PictureCheck:
    """Reads pictures of a data file's rows, those of a row once."""

    def __init__(self, data: Data) -> None:
        """Read nothing yet.

        Args:
            data: the rows' file.

        """
        self._data = data
        self._faults: dict[str, str | None] = {}

    def any_readable(self, rows: Iterable[Row]) -> bool:
        """Whether a row's pictures can be read. No row is read after the first one whose can."""
        for row in rows:
            if row.index not in self._faults:
                self._faults[row.index] = _fault(self._data, row)
            if self._faults[row.index] is None:
                return True
        return False

    def unreadable(self, rows: Sequence[Row], report: Callable[[int, int], None]) -> dict[str, str]:
        """Read the pictures of rows.

        Args:
            rows: which.
            report: called as report(rows done, rows), after each that was not read before.

        Returns:
            What is wrong with the pictures that cannot be read, by their row's index.

        """
        new = [row for row in rows if row.index not in self._faults]
        with closing(in_threads(functools.partial(_fault, self._data), new)) as read:
            for done, (row, fault) in enumerate(read, 1):
                self._faults[row.index] = fault
                report(done, len(new))
        found = ((row.index, self._faults[row.index]) for row in rows)
        return {index: fault for index, fault in found if fault is not None}


def _fault(data: Data, row: Row) -> str | None:
    """What is wrong with a row's pictures, None for nothing."""
    try:
        for url in data.pictures(row):
            _read(base64.b64decode(url.partition(",")[2], validate=True))
    except Exception as error:  # Pillow's readers raise whatever they stumble over in a broken file.
        return one_line(error)
    return None


def _read(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
