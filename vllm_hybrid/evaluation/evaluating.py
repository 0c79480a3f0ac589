"""An evaluation from end to end: read, ask what is not answered yet, score."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_hybrid.evaluation.asking import Server, ask, find_server
from vllm_hybrid.evaluation.picture_check import PictureCheck
from vllm_hybrid.evaluation.predictions import Predictions
from vllm_hybrid.evaluation.prompts import prompt_of
from vllm_hybrid.evaluation.report import Side
from vllm_hybrid.evaluation.tsv import Data, Row

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What is asked, and where answers are kept.

    Attributes:
        data: the data file.
        rows: those of its rows that are asked.
        template: see `prompts.choose_template`.
        max_tokens: the longest answer.
        concurrency: rows in flight at once.
        out: folder with a folder for each model's answers.

    """

    data: Data
    rows: Sequence[Row]
    template: str
    max_tokens: int
    concurrency: int
    out: Path

    @cached_property
    def _pictures(self) -> PictureCheck:
        return PictureCheck(self.data)

    def answers(self, url: str, model: str | None, progress: Progress, first: Side | None = None) -> Side:
        """A model's answers to all rows whose pictures can be read.

        The server is not needed where they are there already.

        Args:
            url: the server's.
            model: the name it is served by; None for the server's only one.
            progress: called as progress(stage, rows done, rows).
            first: what this is compared with; tells models of the same name apart.

        Raises:
            ValueError: no server, other settings before; see `find_server`, `ask` and `Predictions`.

        """
        server = find_server(url, None) if model is None else None
        name = server.model if server else str(model)
        label = f"{name}-compared" if first and first.name == name else name
        store = Predictions(self.out / folder_name(label))
        settings = self._settings(name)
        store.check(settings)
        failed: dict[str, str] = {}
        missing = [row for row in self.rows if row.index not in store.answered]
        # To read all pictures takes long: whether there is a server to ask comes before.
        needed = self._pictures.any_readable(missing)
        if needed and server is None:
            server = find_server(url, name)
        bad = self._pictures.unreadable(missing, lambda *counts: progress("reading pictures", *counts))
        if needed and server is not None:
            rows = [row for row in self.rows if row.index not in bad]
            failed = self._ask(server, rows, store, settings, progress)
        return Side(label, store.answered, failed, settings, bad)

    def _ask(
        self,
        server: Server,
        rows: Sequence[Row],
        store: Predictions,
        settings: Mapping[str, Any],
        progress: Progress,
    ) -> dict[str, str]:
        with store.writing({**settings, "root": server.root}) as add:
            missing = [row for row in rows if row.index not in store.answered]
            before, total = len(rows) - len(missing), len(rows)
            progress(f"asking {server.model}", before, total)
            return ask(
                server,
                missing,
                lambda row: (self.data.pictures(row), prompt_of(row, self.template)),
                add,
                concurrency=self.concurrency,
                max_tokens=self.max_tokens,
                report=lambda done: progress(f"asking {server.model}", before + done, total),
            )

    def _settings(self, model: str) -> dict[str, Any]:
        return {
            "data": self.data.name,
            "sha256": self.data.digest,
            "model": model,
            "prompt": self.template,
            "max_tokens": self.max_tokens,
        }


def folder_name(model: str) -> str:
    """A model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", model).strip("._") or "model"
