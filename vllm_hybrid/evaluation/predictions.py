"""Answers on disk: one JSON object a line, written as they come, so that a killed run loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@dataclass(frozen=True)
class Prediction:
    """What a model answered to a row.

    Attributes:
        index: the row's.
        prediction: the answer, without white space around it.
        finish_reason: why it ends where it does; "length" means that it was cut.

    """

    index: str
    prediction: str
    finish_reason: str | None = None


class Predictions:
    """One model's answers to one data file, in a folder: predictions.jsonl, and settings.json beside it."""

    def __init__(self, folder: Path) -> None:
        """Read the answers that are there.

        Args:
            folder: need not exist.

        Raises:
            ValueError: a line before the last is damaged.

        """
        self.file = folder / "predictions.jsonl"
        self._settings = folder / "settings.json"
        self.answered = _read(self.file)

    def check(self, settings: Mapping[str, Any]) -> None:
        """See whether the answers there, if any, were given under these settings.

        Args:
            settings: what answers depend on; what is left out may be anything.

        Raises:
            ValueError: they were not.

        """
        if not self._settings.is_file():
            if self.answered:
                raise ValueError(f"{self._settings} is missing; move {self.file} away, or give another --out")
            return
        recorded = json.loads(self._settings.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if recorded.get(name) != value:
                raise ValueError(
                    f"{self.file} has answers with {name} {recorded.get(name)!r}, not {value!r}; "
                    "give another --out, or move them away"
                )

    @contextmanager
    def writing(self, settings: Mapping[str, Any]) -> Iterator[Callable[[Prediction], None]]:
        """A function that adds an answer; when it returns, the answer is on the disk.

        Args:
            settings: see `check`; they are written down.

        Raises:
            ValueError: see `check`; or another run is writing here.

        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.file.with_suffix(".lock"), timeout=0):
                self.answered = _read(self.file)
                self.check(settings)
                _replace(self._settings, json.dumps(dict(settings), indent=2) + "\n")
                _cut_unfinished_line(self.file)
                with self.file.open("a", encoding="utf-8") as opened:

                    def add(answer: Prediction) -> None:
                        opened.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                        opened.flush()
                        os.fsync(opened.fileno())
                        self.answered[answer.index] = answer

                    yield add
        except Timeout:
            raise ValueError(
                f"another run is writing {self.file}; wait for it, or give another --out"
            ) from None


def _read(file: Path) -> dict[str, Prediction]:
    """The answers by index. A last line without an end is none: a run was killed when it wrote it."""
    if not file.is_file():
        return {}
    lines = file.read_bytes().split(b"\n")[:-1]
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            answer = Prediction(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(
                f"line {number} of {file} is no answer of this command; move the file away"
            ) from None
        found[answer.index] = answer
    return found


def _cut_unfinished_line(file: Path) -> None:
    if file.is_file():
        whole = file.read_bytes().rpartition(b"\n")
        os.truncate(file, len(whole[0]) + len(whole[1]))


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
