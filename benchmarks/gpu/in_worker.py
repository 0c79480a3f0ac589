"""What the benchmark does to a model inside vLLM's worker (``LLM.apply_model``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


def watch_counts(model: Any) -> None:
    """Keep every live count that the model reports to the scheduler."""
    report = model.live_counts
    model.reported_counts = []

    def reported(*args: Any) -> list[int]:
        counts = report(*args)
        model.reported_counts += counts
        return counts

    model.live_counts = reported


def take_counts(model: Any) -> list[int]:
    """Live tokens of the images encoded since the last call."""
    counts, model.reported_counts = model.reported_counts, []
    return counts


class SetThresholds:
    """Other thresholds for a running model, so that one start serves all levels of one ratio."""

    def __init__(self, thresholds: Sequence[float | None]) -> None:
        self.thresholds = tuple(thresholds)

    def __call__(self, model: Any) -> None:
        model.hybrid = dataclasses.replace(model.hybrid, thresholds=self.thresholds)
