"""The configurations that are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.accuracy.questions import Asked
from benchmarks.accuracy.settings import Setting, compared, merging, offering
from vllm_hybrid.levels import FULL

if TYPE_CHECKING:
    from benchmarks.accuracy.served import LevelServer

# Answers to all questions, average image tokens before FastV's choice, and after it.
Found = tuple[list[str], float, float]

SERVER, OFFLINE = "server", "offline"
BLANK = "blank picture"


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

    @cached_property
    def section(self) -> dict[str, Any]:
        """The checkpoint's own hybrid section."""
        return json.loads((self.checkpoint / "config.json").read_text())["hybrid"]

    @property
    def settings(self) -> list[Setting]:
        """What a server offers, the full model first."""
        return compared(self.section, self.levels, self.ratios, self.both_ratios)

    def server(self, ranking: dict[str, Any] | None = None) -> LevelServer:
        """A server of all settings; see :func:`offering`."""
        # Not at the top: the offline configurations need nothing that a server needs.
        from benchmarks.accuracy.served import LevelServer

        override = offering(self.settings, self.section, ranking)
        return LevelServer(self.checkpoint, override, self.images, ["--dtype", self.dtype], self.log)

    @property
    def work(self) -> list[Any]:
        """What the answers depend on, for a journal."""
        weights = (self.checkpoint / "model.safetensors").stat()
        config = (self.checkpoint / "config.json").read_text()
        questions = hashlib.sha256(repr(self.asked).encode()).hexdigest()
        return [weights.st_size, weights.st_mtime_ns, config, questions, self.dtype]


def served(setup: Setup, server: LevelServer) -> list[Case]:
    """What the server is asked: the full model first."""

    def case(setting: Setting) -> Case:
        return Case(setting.family, setting.name, SERVER, lambda: server.answers(setting.level, setup.asked))

    return [case(setting) for setting in setup.settings]


def offline(setup: Setup) -> list[Case]:
    """What no server offers, and the full model once more."""
    from benchmarks.accuracy import offline as shown

    thresholds = merging(setup.section, setup.levels)

    def case(family: str, name: str, image_tokens: shown.ImageTokens) -> Case:
        return Case(family, name, OFFLINE, lambda: _answer(setup, image_tokens))

    closed_up = "merged, closed up"
    return [
        case(FULL, "all patches", shown.everything),
        case(BLANK, "all patches", shown.blank),
        *(case(closed_up, level, shown.closed_up(values, False)) for level, values in thresholds.items()),
        *(
            case(f"{closed_up}, in reading order", level, shown.closed_up(values, True))
            for level, values in thresholds.items()
        ),
        *(
            case("random, as many as merged", level, shown.fewer_from_the_start(values))
            for level, values in thresholds.items()
        ),
        *(
            case("random, as many as pruned", f"R = {r:g}", shown.fewer_after_the_choice(r))
            for r in setup.ratios
        ),
    ]


def _answer(setup: Setup, image_tokens: Any) -> Found:
    from benchmarks.accuracy.offline import OfflineModel, answer_all

    model = OfflineModel(setup.checkpoint, setup.section["fastv_layer"])
    return answer_all(model, image_tokens, setup.images, setup.asked)
