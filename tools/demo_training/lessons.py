"""A lesson is one stage of the curriculum: its batches, its loss, how long and how fast it goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from tools.demo_training.batches import Batch


@dataclass(frozen=True)
class Pace:
    """Steps, peak learning rate, pictures a step and process, share of steps in which the rate falls."""

    steps: int
    rate: float
    pictures: int
    decay: float = 0.3


class Lesson(Protocol):
    """One stage."""

    name: str
    pace: Pace

    def parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """What is trained, by name."""
        ...

    def batch(self, seed: list[int]) -> Batch:
        """A batch; runs in another process, and only the seed decides what is in it."""
        ...

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss to descend and figures to log."""
        ...

    def examine(self, rank: int) -> dict[str, tuple[float, int]]:
        """Right answers and questions of held-out pictures by task; processes of other ranks see others."""
        ...
