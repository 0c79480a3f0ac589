"""Rows of a data file that cannot be asked or scored: one bad row costs no other, and none is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Why, as it goes on from "3 rows ...".
NO_PICTURE = "without a picture"
NO_ANSWER = "without an answer to compare with"
NO_QUESTION = "without a question"
NO_INDEX = "without an index"
SAME_INDEX = "with the index of a row before"
OTHER_CELLS = "with more or fewer cells than there are columns"
UNCLOSED = "with a quotation mark that is not closed"
NOT_TEXT = "that are not UTF-8"
NOT_A_TABLE = "that cannot be read as cells with tabs between"
NO_OWNER = "with the picture of a row that has none"
BAD_PICTURE = "with a picture that cannot be read"

# Names of the rows by why they are left out.
LeftOut = dict[str, list[str]]


def merged(*parts: Mapping[str, Sequence[str]]) -> LeftOut:
    """All rows of several, each once."""
    found: LeftOut = {}
    for part in parts:
        for why, names in part.items():
            known = found.setdefault(why, [])
            known += [name for name in names if name not in set(known)]
    return found


def sentences(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """One for each reason: how many rows, and the first of them."""
    return [
        f"left out: {len(names)} {'row' if len(names) == 1 else 'rows'} {why}, "
        f"{'which is' if len(names) == 1 else 'such as'} {names[0]}"
        for why, names in left_out.items()
    ]
