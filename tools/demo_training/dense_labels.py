"""What every patch of a picture shows: the tower's first lessons."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_hybrid.demo.scenes import COLOURS, KINDS, Scene

BACKGROUND = 0
_KIND_IDS = {kind: number for number, kind in enumerate(KINDS, 1)}
_COLOUR_IDS = {colour: number for number, colour in enumerate(COLOURS, 1)}
KIND_CLASSES, COLOUR_CLASSES = len(KINDS) + 1, len(COLOURS) + 1


@dataclass(frozen=True)
class DenseLabels:
    """Labels [patches, patches] of int64; a patch belongs to the thing whose box holds the patch's centre."""

    kind: np.ndarray
    colour: np.ndarray
    # Cell of the patch's thing, -100 (no loss) on the background.
    cell: np.ndarray
    # 1 where a thing has its centre.
    centre: np.ndarray


def dense_labels(scene: Scene, patch: int = 14) -> DenseLabels:
    """Label every patch of a picture whose side is a multiple of ``patch`` pixels."""
    side = len(scene.pixels) // patch
    kind, colour, centre = (np.zeros((side, side), np.int64) for _ in range(3))
    cell = np.full((side, side), -100, np.int64)
    for thing in scene.things:
        left, top, right, bottom = (round(edge / patch) for edge in thing.box)
        inside = np.s_[top:bottom, left:right]
        kind[inside], colour[inside] = _KIND_IDS[thing.kind], _COLOUR_IDS[thing.colour]
        cell[inside] = thing.cell
        middle_x, middle_y = (thing.box[0] + thing.box[2]) // 2, (thing.box[1] + thing.box[3]) // 2
        centre[middle_y // patch, middle_x // patch] = 1
    return DenseLabels(kind, colour, cell, centre)
