"""The requests that check an engine: a tiny checkpoint, pictures and prompts, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.engines import Ask
from tests.support.tiny_checkpoints import make_images, prompt, write_checkpoint

SEED = 1
# What ``pick_thresholds`` finds for the checkpoint and the pictures of seed 1 to merge 60 % of the even
# tokens in each tower layer. No merge and no prune of the requests below is a matter of float32 rounding
# (``is_decided``).
THRESHOLDS = [0.9390315413475037, 0.9547346830368042, 0.9526028037071228]
FASTV_LAYER = 2
PICTURES = ("flat", "shapes", "half", "noise")
QUESTION = "What is here?"
TEXT = "USER: Hello there ASSISTANT:"


@dataclass(frozen=True)
class CheckCase:
    """Requests that an engine answers, and what has to happen meanwhile for the case to count.

    Attributes:
        pictures: of each request, by number; none: text alone. No picture stands in two requests.
        tokens: new tokens of each.
        gap: steps of the engine between two arrivals; None: each comes when the one before is answered.
        squeezed: whether the pool's free blocks are taken away once all requests are answering.
        condition: what has to happen: ``padded``, ``mixed`` or ``preempted``; None: nothing.
        says: that it did not, in words.

    """

    pictures: tuple[tuple[int, ...], ...]
    tokens: int
    gap: int | None = 0
    squeezed: bool = False
    condition: str | None = None
    says: str = ""

    def asks(self) -> list[Ask]:
        """Its requests."""
        images = make_images()
        return [
            Ask(prompt(QUESTION, len(own)) if own else TEXT, tuple(images[PICTURES[i]] for i in own))
            for own in self.pictures
        ]


CASES = {
    "alone": CheckCase(((0,), (1,)), 6, gap=None),
    "together": CheckCase(((0,), (1,), (), (2,), (3,)), 8),
    "two pictures": CheckCase(((0, 1), (2, 3)), 6),
    "padded": CheckCase(
        ((0,), (1,), (2,)), 8, condition="padded", says="no decode of three was filled up to a graph of four"
    ),
    "mixed": CheckCase(
        ((0,), (1,), (2,), (3,)), 12, gap=3, condition="mixed", says="no step had a prompt and a decode"
    ),
    "preempted": CheckCase(
        ((0,), (1,), (2,), (3,)), 24, squeezed=True, condition="preempted", says="no request was preempted"
    ),
}


def checkpoint(folder: Path) -> Path:
    """The checkpoint, written into a folder where it is not there."""
    path = folder / "checkpoint"
    if not (path / "model.safetensors").exists():
        write_checkpoint(path, seed=SEED)
    return path


def section(ratio: float) -> dict[str, Any]:
    """The hybrid section of an engine that drops a share of an image's tokens."""
    return {"thresholds": THRESHOLDS, "fastv_layer": FASTV_LAYER, "fastv_ratio": ratio}
