"""VLMEvalKit's data files: tables with tabs whose rows hold a picture, right answers, perhaps a question.

https://github.com/open-compass/VLMEvalKit, ``vlmeval/dataset/image_base.py``. Such a file may be larger than
memory. It is read once without keeping its pictures; a picture is read again when its row is asked about.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_hybrid.evaluation.left_out import (
    NO_ANSWER,
    NO_INDEX,
    NO_OWNER,
    NO_PICTURE,
    NO_QUESTION,
    NOT_TEXT,
    SAME_INDEX,
    LeftOut,
    sentences,
)
from vllm_hybrid.evaluation.records import Record, cells_at, read_records
from vllm_hybrid.files import check_present

# The variable that names VLMEvalKit's data folder.
LMU_DATA = "LMUData"
# A text this short in the column "image" is no picture but the index of the row that has it.
LONGEST_INDEX = 64
# What columns of right answers are called.
ANSWERS = ("answer", "answers")
# How pictures of a type begin in base64. Anything else is called a JPEG; servers look for themselves.
_TYPES = {"iVBORw": "png", "R0lGOD": "gif", "UklGR": "webp", "Qk": "bmp"}


@dataclass(frozen=True)
class Row:
    """A row of a data file without its picture.

    Attributes:
        index: its name, which no other row has.
        cells: the texts of all other columns that are not empty.
        references: the right answers, at least one.
        place: where it starts in the file, in bytes.

    """

    index: str
    cells: dict[str, str]
    references: list[str]
    place: int


@dataclass(frozen=True)
class Data:
    """A data file.

    Attributes:
        file: where it is.
        name: what its pictures' folder is called after.
        columns: what its rows have.
        rows: those that can be asked and scored, in order.
        left_out: those that cannot, by why.
        places: where rows with a picture of their own start in the file, by index; also those left out.
        digest: SHA-256 of the file.

    """

    file: Path
    name: str
    columns: list[str]
    rows: list[Row]
    left_out: LeftOut
    places: dict[str, int]
    digest: str

    @property
    def asks(self) -> bool:
        """Whether the file brings questions; else it wants captions."""
        return "question" in self.columns

    def pictures(self, row: Row) -> list[str]:
        """The row's pictures, as URLs that contain them.

        Raises:
            ValueError: a picture's file is missing.
            OSError: it cannot be opened.

        """
        if "image" not in self.columns:
            return [_file_url(self._find(path)) for path in listed(row.cells["image_path"])]
        cell = self._image(row.place)
        if len(cell) <= LONGEST_INDEX:
            cell = self._image(self.places[cell])
        return [_url(_compact(picture)) for picture in listed(_compact(cell))]

    def _image(self, place: int) -> str:
        return cells_at(self.file, place)[self.columns.index("image")]

    def _find(self, path: str) -> Path:
        folders = [self.file.parent, self.file.parent / "images" / self.name]
        found = next((folder / path for folder in folders if (folder / path).is_file()), None)
        if found is None:
            raise ValueError(f"the picture {path} is in neither {folders[0]} nor {folders[1]}")
        return found


def find_data(name: str) -> Path:
    """The data file of a name, as VLMEvalKit has it: in the folder $LMUData, or ~/LMUData.

    Args:
        name: such as COCO_VAL; or a file's path, which is taken as it is.

    Raises:
        ValueError: there is no such file.

    """
    given = Path(name)
    if given.suffix == ".tsv" or given.is_file():
        if not given.is_file():
            raise ValueError(f"{given} is no file")
        return given
    folder = Path(os.environ.get(LMU_DATA) or Path.home() / "LMUData")
    if not (folder / f"{name}.tsv").is_file():
        raise ValueError(
            f"{folder} has no {name}.tsv; put VLMEvalKit's file there, set {LMU_DATA} to its folder, "
            "or give the file's path"
        )
    return folder / f"{name}.tsv"


def read_data(file: Path) -> Data:
    """Read a data file, without its pictures.

    A row with a fault of its own is left out, and said to be; faults of the whole file are refused.

    Args:
        file: its columns are "index", "image" or "image_path", "answer" or "answers" (the first of
            the two that is filled counts) and any others.

    Raises:
        ValueError: a column is missing, no row can be asked and scored, or it is no such file.

    """
    check_present(file)
    digest = hashlib.sha256()
    table = read_records(file, digest.update)
    header = next(table)
    if header.fault is not None or not _is_text(header.cells):
        raise ValueError(
            f"{file} cannot be read as a table with tabs: its first line does not name columns in UTF-8"
        )
    columns = [name.removeprefix("\ufeff") for name in header.cells]
    _check_columns(file, columns)
    rows, left_out, places = _read_rows(columns, table)
    if not rows:
        raise ValueError(f"{file} has no row that can be asked and scored; {'; '.join(sentences(left_out))}")
    return Data(file, file.stem, columns, rows, left_out, places, digest.hexdigest())


def listed(cell: str) -> list[str]:
    """The texts of a cell that may hold one, or several written as a Python list."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [cell]
        return [str(text) for text in value]
    return [cell]


def _is_text(cells: Iterable[str]) -> bool:
    """Whether all bytes of a record were UTF-8."""
    try:
        for cell in cells:
            cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_columns(file: Path, columns: list[str]) -> None:
    for wanted in (("index",), ("image", "image_path"), ANSWERS):
        if not set(wanted) & set(columns):
            raise ValueError(f"{file} has no column {' or '.join(wanted)}; it has {', '.join(columns)}")


def _read_rows(columns: list[str], table: Iterator[Record]) -> tuple[list[Row], LeftOut, dict[str, int]]:
    """The rows, those left out, and the places of pictures; see `Data`."""
    rows: dict[str, Row] = {}
    left_out: LeftOut = {}
    places: dict[str, int] = {}
    owners: dict[str, str] = {}
    for record in table:
        if not record.cells and record.fault is None:
            continue
        why = _record_fault(columns, record, rows)
        if why is not None:
            left_out.setdefault(why, []).append(record.name)
            continue
        cells = _cells(columns, record)
        index = cells.pop("index")
        picture = cells.pop("image", "")
        if len(picture) > LONGEST_INDEX:
            places.setdefault(index, record.place)
        row = Row(index, cells, _pop_references(cells), record.place)
        why = _row_fault(columns, row, picture)
        if why is not None:
            left_out.setdefault(why, []).append(f"row {index}")
            continue
        rows[index] = row
        if 0 < len(picture) <= LONGEST_INDEX:
            owners[index] = picture
    for index, owner in owners.items():
        if owner not in places:
            del rows[index]
            left_out.setdefault(NO_OWNER, []).append(f"row {index}")
    return list(rows.values()), left_out, places


def _cells(columns: list[str], record: Record) -> dict[str, str]:
    """A record's texts by column, those that are blank left out."""
    return {column: text for column, text in zip(columns, record.cells, strict=True) if text.strip()}


def _pop_references(cells: dict[str, str]) -> list[str]:
    """Take the right answers out of a row's texts: those of the first column that has any."""
    found = [listed(cells.pop(name, "")) for name in ANSWERS]
    filled = ([text for text in texts if text.strip()] for texts in found)
    return next((texts for texts in filled if texts), [])


def _record_fault(columns: list[str], record: Record, rows: Mapping[str, Row]) -> str | None:
    """Why a record is no row with a name of its own; None if it is."""
    if record.fault is not None:
        return record.fault
    if not _is_text(record.cells):
        return NOT_TEXT
    index = _cells(columns, record).get("index")
    if index is None:
        return NO_INDEX
    return SAME_INDEX if index in rows else None


def _row_fault(columns: list[str], row: Row, picture: str) -> str | None:
    """Why a row cannot be asked or scored; None if it can."""
    if not picture and ("image" in columns or "image_path" not in row.cells):
        return NO_PICTURE
    if not row.references:
        return NO_ANSWER
    if "question" in columns and "question" not in row.cells and not {"A", "B"} <= set(row.cells):
        return NO_QUESTION
    return None


def _compact(encoded: str) -> str:
    """Base64 without white space: some programs break it into lines."""
    return "".join(encoded.split())


def _url(encoded: str) -> str:
    kind = next((kind for start, kind in _TYPES.items() if encoded.startswith(start)), "jpeg")
    return f"data:image/{kind};base64,{encoded}"


def _file_url(file: Path) -> str:
    return _url(base64.b64encode(file.read_bytes()).decode())
