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
        out: folder with a folder for the answers of each model, at each detail.

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

    def answers(
        self,
        url: str,
        model: str | None,
        progress: Progress,
        first: Side | None = None,
        detail: str | None = None,
    ) -> Side:
        """A model's answers to all rows whose pictures can be read.

        The server is not needed where they are there already.

        Args:
            url: the server's.
            model: the name it is served by; None for the server's only one.
            progress: called as progress(stage, rows done, rows).
            first: what another model answered; tells models of the same name apart.
            detail: OpenAI's ``detail`` of every picture; None sends none.

        Raises:
            ValueError: no server, no such detail, other settings before; see `find_server`, `ask` and
                `Predictions`.

        """
        server = find_server(url, None) if model is None else None
        name = server.model if server else str(model)
        label = f"{name}-compared" if first and first.settings["model"] == name else name
        label = label if detail is None else f"{label}-at-{detail}"
        store = Predictions(self.out / folder_name(label))
        settings = self._settings(name, detail)
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
            failed = self._ask(server, rows, store, settings, progress, detail)
        return Side(label, store.answered, failed, settings, bad)

    def _ask(
        self,
        server: Server,
        rows: Sequence[Row],
        store: Predictions,
        settings: Mapping[str, Any],
        progress: Progress,
        detail: str | None,
    ) -> dict[str, str]:
        with store.writing({**settings, "root": server.root}) as add:
            missing = [row for row in rows if row.index not in store.answered]
            before, total = len(rows) - len(missing), len(rows)
            stage = f"asking {server.model}" + ("" if detail is None else f" at {detail}")
            progress(stage, before, total)
            return ask(
                server,
                missing,
                lambda row: (self.data.pictures(row), prompt_of(row, self.template)),
                add,
                concurrency=self.concurrency,
                max_tokens=self.max_tokens,
                report=lambda done: progress(stage, before + done, total),
                detail=detail,
            )

    def _settings(self, model: str, detail: str | None) -> dict[str, Any]:
        # What is not sent is not written down.
        said = {} if detail is None else {"detail": detail}
        return {
            "data": self.data.name,
            "sha256": self.data.digest,
            "model": model,
            "prompt": self.template,
            "max_tokens": self.max_tokens,
            **said,
        }


def check_details(details: Sequence[str]) -> Sequence[str]:
    """Details as a user gave them, each to be asked at once.

    Raises:
        ValueError: one is empty, or there twice.

    """
    for detail in details:
        if not detail.strip():
            raise ValueError("--detail is empty; give the name of a level or of an OpenAI detail")
        if details.count(detail) > 1:
            raise ValueError(f"--detail {detail} is given {details.count(detail)} times; give it once")
    return details


def ask_models(
    evaluation: Evaluation,
    models: Sequence[tuple[str, str | None]],
    details: Sequence[str],
    progress: Progress,
) -> list[Side]:
    """The answers of one model or two, one side for each detail of the first, then for each of the second.

    Args:
        evaluation: what is asked.
        models: each server's URL and the name its model is served by; see :meth:`Evaluation.answers`.
        details: what to send as ``detail``; where there are none, none is sent.
        progress: see there.

    Raises:
        ValueError: see there.

    """
    sides: list[Side] = []
    for number, (url, model) in enumerate(models):
        first = sides[0] if number else None
        for detail in details or (None,):
            sides.append(evaluation.answers(url, model, progress, first, detail))
    return sides


def report_name(sides: Sequence[Side], details: Sequence[str]) -> str:
    """The name of the file with the scores of some sides.

    Args:
        sides: each model's, one after the other.
        details: those that each model was asked at, in the order of its sides; none where none was sent.

    """
    at = f"-at-{'-and-'.join(details)}" if details else ""
    own = f"-at-{details[0]}" if details else ""
    models = [side.name.removesuffix(own) for side in sides[:: len(details) or 1]]
    return folder_name("-and-".join(map(folder_name, models)) + at) + ".json"


def folder_name(model: str) -> str:
    """A model's name as the name of a folder."""
    return re.sub(r"[^\w.-]+", "_", model).strip("._") or "model"
