"""How blocks of threads share out rows that are packed by image, where only the device knows the lengths."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_stretch(starts, tile, stretches, TILE: tl.constexpr):
    """The stretch of rows that a tile belongs to; stretch s has tiles starts[s] // TILE + s and following.

    Which comes to at least one tile for each, an empty one included, and none that two share.
    """
    low = tile * 0
    high = low + stretches
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TILE + middle <= tile:
            low = middle
        else:
            high = middle
    return low


def tile_count(rows: int, stretches: int, tile: int) -> int:
    """Tiles that hold all stretches of ``rows`` rows, however long each is; some may be left over."""
    return triton.cdiv(rows, tile) + stretches
