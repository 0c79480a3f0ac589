"""Records of a table with tabs, in which a quoted cell may go on over lines, as pandas writes it.

A quotation mark that is never closed would take in every line up to the next one. A record that cannot be
right costs its first line only: reading starts again at its second.
"""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_hybrid.evaluation.left_out import NOT_A_TABLE, OTHER_CELLS, UNCLOSED

# So many lines that each look like a row are no single cell. It bounds what is kept in memory.
MOST_ROWS_IN_A_CELL = 100


@dataclass(frozen=True)
class Record:
    """A record of a table.

    Attributes:
        place: the byte where it starts.
        first_line: its first line, counted from 1.
        last_line: its last.
        cells: its cells, as many as there are columns if it has no fault; none on an empty line.
            Bytes that are not UTF-8 are lone surrogates.
        fault: why it cannot be a row, as in `left_out`; None if it can.

    """

    place: int
    first_line: int
    last_line: int
    cells: list[str]
    fault: str | None

    @property
    def name(self) -> str:
        """What to call it where it has no index."""
        if self.first_line == self.last_line:
            return f"line {self.first_line}"
        return f"lines {self.first_line} to {self.last_line}"


@dataclass(frozen=True)
class _Line:
    place: int
    number: int
    text: str


def read_records(file: Path, seen: Callable[[bytes], object]) -> Iterator[Record]:
    """The records of a table: its header, then the others.

    Args:
        file: the table.
        seen: called with every line of the file, once and in order.

    Yields:
        Each record. How many cells the header has is how many the others must have.

    """
    lines = _lines(file, seen)
    again: deque[_Line] = deque()
    width: int | None = None
    while True:
        taken: list[_Line] = []
        record = _next_record(_waiting(again, lines, taken), taken, width)
        if record is None:
            return
        if record.fault is not None:
            again.extendleft(reversed(taken[1:]))
        if width is None:
            width = len(record.cells)
        yield record


def cells_at(file: Path, place: int) -> list[str]:
    """The cells of the record that starts at a byte of a table."""
    with file.open("rb") as opened:
        opened.seek(place)
        return next(_reader(line.decode() for line in opened))


def _lines(file: Path, seen: Callable[[bytes], object]) -> Iterator[_Line]:
    place = 0
    with file.open("rb") as opened:
        for number, content in enumerate(opened, 1):
            seen(content)
            yield _Line(place, number, content.decode(errors="surrogateescape"))
            place += len(content)


def _waiting(again: deque[_Line], lines: Iterator[_Line], taken: list[_Line]) -> Iterator[_Line]:
    """The lines to read next, each put into `taken`."""
    while True:
        line = again.popleft() if again else next(lines, None)
        if line is None:
            return
        taken.append(line)
        yield line


def _next_record(lines: Iterator[_Line], taken: list[_Line], width: int | None) -> Record | None:
    """The record that starts at the next line; None at the end.

    Args:
        lines: the lines to read.
        taken: where `lines` puts those that were read.
        width: how many cells a row has; None for the header.

    """
    ended = False
    cells: list[str] = []
    fault: str | None

    def texts() -> Iterator[str]:
        nonlocal ended
        rows = 0
        for line in lines:
            rows += len(taken) > 1 and _is_like_a_row(line, taken[0], width)
            if rows > MOST_ROWS_IN_A_CELL:
                raise csv.Error("a quoted cell takes in rows")
            yield line.text
        ended = True

    try:
        cells = next(_reader(texts()))
    except StopIteration:
        return None
    except csv.Error:
        fault = UNCLOSED if len(taken) > 1 else NOT_A_TABLE
    else:
        # The reader asks for a line more than there are only inside a quotation.
        fault = UNCLOSED if ended else _fault(taken, cells, width)
    first, last = taken[0], taken[-1] if fault is None else taken[0]
    return Record(first.place, first.number, last.number, cells, fault)


def _fault(lines: Sequence[_Line], cells: Sequence[str], width: int | None) -> str | None:
    """Why the cells read from some lines cannot be a row; None if they can."""
    fits = width is None or not cells or len(cells) == width
    # People's own tables have marks inside cells that are not doubled; such cells contain no rows.
    doubtful = not fits or any(_is_like_a_row(line, lines[0], width) for line in lines[1:])
    if doubtful and len(lines) > 1 and not _is_well_quoted(lines):
        return UNCLOSED
    return None if fits else OTHER_CELLS


def _is_like_a_row(line: _Line, first: _Line, width: int | None) -> bool:
    """Whether a later line of a record has as many tabs as a row, or as the header's first line."""
    tabs = first.text.count("\t") if width is None else width - 1
    return tabs > 0 and line.text.count("\t") == tabs


def _is_well_quoted(lines: Sequence[_Line]) -> bool:
    """Whether every mark in a quoted cell is doubled, and the last one of a cell at its end."""
    try:
        next(_reader((line.text for line in lines), strict=True))
    except csv.Error:
        return False
    return True


def _reader(lines: Iterator[str], strict: bool = False) -> Iterator[list[str]]:
    # Pictures are far longer than what csv takes by default.
    csv.field_size_limit(sys.maxsize)
    return csv.reader(lines, delimiter="\t", strict=strict)
