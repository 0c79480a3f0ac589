"""VLMEvalKit's data files: tables with tabs whose rows hold a picture, right answers, perhaps a question.

https://github.com/open-compass/VLMEvalKit, ``vlmeval/dataset/image_base.py``. Such a file may be larger than
memory. It is read once without keeping its pictures; a picture is read again when its row is asked about.
"""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

# The variable that names VLMEvalKit's data folder.
LMU_DATA = "LMUData"
# A text this short in the column "image" is no picture but the index of the row that has it.
LONGEST_INDEX = 64
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
        rows: those that have a picture, in order.
        left_out: how many have none.
        digest: SHA-256 of the file.

    """

    file: Path
    name: str
    columns: list[str]
    rows: list[Row]
    left_out: int
    digest: str

    @property
    def asks(self) -> bool:
        """Whether the file brings questions; else it wants captions."""
        return "question" in self.columns

    def pictures(self, row: Row) -> list[str]:
        """The row's pictures, as URLs that contain them.

        Raises:
            ValueError: a picture's file, or the row that is to have it, is missing.

        """
        if "image" not in self.columns:
            return [_file_url(self._find(path)) for path in listed(row.cells["image_path"])]
        cell = self._image(row)
        if len(cell) <= LONGEST_INDEX:
            owner = self._by_index.get(cell)
            cell = self._image(owner) if owner else ""
        if len(cell) <= LONGEST_INDEX:
            raise ValueError(
                f"row {row.index} of {self.file} names another row's picture, which is not there"
            )
        return [_url(picture) for picture in listed(cell)]

    @cached_property
    def _by_index(self) -> dict[str, Row]:
        return {row.index: row for row in self.rows}

    def _image(self, row: Row) -> str:
        with self.file.open("rb") as opened:
            opened.seek(row.place)
            cells = next(csv.reader((line.decode() for line in opened), delimiter="\t"))
        return cells[self.columns.index("image")]

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

    Args:
        file: its columns are "index", "image" or "image_path", "answer" (or "answers") and any others.

    Raises:
        ValueError: a column or an answer is missing, an index comes twice, or it is no such file.

    """
    # Pictures are far longer than what csv takes by default.
    csv.field_size_limit(sys.maxsize)
    digest = hashlib.sha256()
    try:
        table = _records(file, digest)
        columns = [name.removeprefix("\ufeff") for name in next(table, (0, [""]))[1]]
        _check_columns(file, columns)
        rows, left_out = _read_rows(file, columns, table)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a table with tabs: {error}") from error
    if not rows:
        raise ValueError(f"{file} has no row with a picture")
    return Data(file, file.stem, columns, rows, left_out, digest.hexdigest())


def listed(cell: str) -> list[str]:
    """The texts of a cell that may hold one, or several written as a Python list."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError):
            return [cell]
        if value:
            return [str(text) for text in value]
    return [cell]


def _records(file: Path, digest: Any) -> Iterator[tuple[int, list[str]]]:
    """Where each record starts, and its cells."""
    place = 0

    def lines() -> Iterator[str]:
        nonlocal place
        with file.open("rb") as opened:
            for line in opened:
                place += len(line)
                digest.update(line)
                yield line.decode()

    reader = csv.reader(lines(), delimiter="\t")
    start = place
    for cells in reader:
        yield start, cells
        start = place


def _check_columns(file: Path, columns: list[str]) -> None:
    for wanted in (["index"], ["image", "image_path"], ["answer", "answers"]):
        if not set(wanted) & set(columns):
            raise ValueError(f"{file} has no column {' or '.join(wanted)}; it has {', '.join(columns)}")


def _read_rows(
    file: Path, columns: list[str], table: Iterator[tuple[int, list[str]]]
) -> tuple[list[Row], int]:
    """The rows with a picture, and how many have none."""
    answer = "answer" if "answer" in columns else "answers"
    picture = "image" if "image" in columns else "image_path"
    rows: dict[str, Row] = {}
    left_out = 0
    for place, texts in table:
        if not texts:
            continue
        if len(texts) != len(columns):
            raise ValueError(
                f"a row of {file} has {len(texts)} cells for {len(columns)} columns: {texts[0][:20]}"
            )
        cells = {column: text for column, text in zip(columns, texts, strict=True) if text}
        if picture not in cells:
            left_out += 1
            continue
        cells.pop("image", None)
        index = cells.pop("index", "")
        if not index or index in rows:
            raise ValueError(f"{file} has {f'two rows {index}' if index else 'a row without an index'}")
        if answer not in cells:
            raise ValueError(f"row {index} of {file} has no answer to compare with")
        rows[index] = Row(index, cells, listed(cells.pop(answer)), place)
    return list(rows.values()), left_out


def _url(encoded: str) -> str:
    kind = next((kind for start, kind in _TYPES.items() if encoded.startswith(start)), "jpeg")
    return f"data:image/{kind};base64,{encoded}"


def _file_url(file: Path) -> str:
    return _url(base64.b64encode(file.read_bytes()).decode())
