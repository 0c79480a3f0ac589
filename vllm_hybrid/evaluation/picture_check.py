"""Which rows have pictures that cannot be read, found before a server is asked about them.

A server would refuse such a row each time it is asked. Pillow reads pictures here, as it does there.
"""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from .tsv import Data, Row

# Large pictures at once are much memory.
MOST_THREADS = 8


def unreadable(data: Data, rows: Sequence[Row], report: Callable[[int], None]) -> dict[str, str]:
    """Read the pictures of rows.

    Args:
        data: the rows' file.
        rows: which.
        report: called with the number of rows that are done, after each.

    Returns:
        What is wrong with the pictures that cannot be read, by their row's index.

    """
    found: dict[str, str] = {}
    pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS))
    try:
        faults = pool.map(functools.partial(_fault, data), rows)
        for done, (row, fault) in enumerate(zip(rows, faults, strict=True), 1):
            if fault is not None:
                found[row.index] = fault
            report(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _fault(data: Data, row: Row) -> str | None:
    """What is wrong with a row's pictures, None for nothing."""
    try:
        for url in data.pictures(row):
            _read(base64.b64decode(url.partition(",")[2], validate=True))
    except Exception as error:  # Pillow's readers raise whatever they stumble over in a broken file.
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _read(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
