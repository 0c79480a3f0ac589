"""The configurations that are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.accuracy.questions import Asked

# Answers to all questions, average image tokens before FastV's choice, and after it.
Found = tuple[list[str], float, float]

SERVER, OFFLINE = "server", "offline"
FULL, BLANK = "full", "blank picture"


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes:
        family: what is varied; a line of the plot.
        name: of the configuration.
        where: whether the server answers or, offline, transformers.
        run: asks everything.

    """

    family: str
    name: str
    where: str
    run: Callable[[], Found]

    @property
    def title(self) -> str:
        """Name for a log."""
        return f"{self.family}, {self.name} ({self.where})"


@dataclass(frozen=True)
class Setup:
    """What all configurations have in common, and which there are."""

    checkpoint: Path
    images: list[Image.Image]
    asked: list[Asked]
    dtype: str
    log: Path
    levels: list[str]
    ratios: list[float]
    both_ratios: list[float]

    @property
    def section(self) -> dict[str, Any]:
        """The checkpoint's own hybrid section."""
        return json.loads((self.checkpoint / "config.json").read_text())["hybrid"]

    @property
    def work(self) -> list[Any]:
        """What the answers depend on, for a journal."""
        weights = (self.checkpoint / "model.safetensors").stat()
        config = (self.checkpoint / "config.json").read_text()
        questions = hashlib.sha256(repr(self.asked).encode()).hexdigest()
        return [weights.st_size, weights.st_mtime_ns, config, questions, self.dtype]


def cases(setup: Setup) -> list[Case]:
    """All configurations: the full model, served, first."""
    return [*_served(setup), *_offline(setup)]


def _served(setup: Setup) -> list[Case]:
    thresholds, layer = setup.section["thresholds"], setup.section["fastv_layer"]

    def case(family: str, name: str, section: dict[str, Any] | None) -> Case:
        return Case(family, name, SERVER, lambda: _serve(setup, section))

    def pruned(level: str | None, ratio: float) -> dict[str, Any]:
        values = None if level is None else thresholds[level]
        return {"thresholds": values, "fastv_layer": layer, "fastv_ratio": ratio}

    return [
        case(FULL, "all patches", None),
        *(case("merged", level, {"thresholds": thresholds[level]}) for level in setup.levels),
        *(case("pruned", f"R = {r:g}", pruned(None, r)) for r in setup.ratios),
        *(
            case(f"both, R = {r:g}", level, pruned(level, r))
            for r in setup.both_ratios
            for level in setup.levels
        ),
    ]


def _serve(setup: Setup, section: dict[str, Any] | None) -> Found:
    from benchmarks.accuracy.served import serve_and_ask

    options = ["--dtype", setup.dtype]
    return serve_and_ask(setup.checkpoint, section, setup.images, setup.asked, options, setup.log)


def _offline(setup: Setup) -> list[Case]:
    from benchmarks.accuracy import offline

    thresholds = setup.section["thresholds"]

    def case(family: str, name: str, image_tokens: offline.ImageTokens) -> Case:
        return Case(family, name, OFFLINE, lambda: _answer(setup, image_tokens))

    closed_up = "merged, closed up"
    return [
        case(FULL, "all patches", offline.everything),
        case(BLANK, "all patches", offline.blank),
        *(case(closed_up, level, offline.closed_up(thresholds[level], False)) for level in setup.levels),
        *(
            case(f"{closed_up}, in reading order", level, offline.closed_up(thresholds[level], True))
            for level in setup.levels
        ),
        *(
            case("random, as many as merged", level, offline.fewer_from_the_start(thresholds[level]))
            for level in setup.levels
        ),
        *(
            case("random, as many as pruned", f"R = {r:g}", offline.fewer_after_the_choice(r))
            for r in setup.ratios
        ),
    ]


def _answer(setup: Setup, image_tokens: Any) -> Found:
    from benchmarks.accuracy.offline import OfflineModel, answer_all

    model = OfflineModel(setup.checkpoint, setup.section["fastv_layer"])
    return answer_all(model, image_tokens, setup.images, setup.asked)
