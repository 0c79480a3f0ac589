"""Work on pictures in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Large pictures at once are much memory; more threads read little faster.
MOST_THREADS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(
    work: Callable[[_Item], _Result], items: Sequence[_Item]
) -> Generator[tuple[_Item, _Result], None, None]:
    """Each item with what is made of it, in order, as soon as it is known.

    Whoever stops taking results ends the work that has not begun.
    """
    pool = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MOST_THREADS))
    try:
        yield from zip(items, pool.map(work, items), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)
