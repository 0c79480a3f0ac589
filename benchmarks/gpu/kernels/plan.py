"""Which scenes the kernels are checked and timed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.kernels.scenes import Heads, SceneShape
from benchmarks.gpu.kernels.tower_scenes import TowerHeads, TowerShape, granted_rows, tower_lengths

BF16, FLOAT32 = torch.bfloat16, torch.float32
SEVEN_B = Heads(32, 32, 128)
GROUPED = Heads(32, 8, 128)
# Those of the checkpoints that checks/run.py serves.
SMALL = Heads(4, 2, 64)
# CLIP ViT-L at 336 pixels, as LLaVA-1.5 runs it.
VIT_L, VIT_L_PATCHES, VIT_L_LAYERS = TowerHeads(16, 64), 576, 23
SMALL_TOWER = TowerHeads(2, 32)
LIVES = (90, 195, 394)
# A KV row's offset no longer fits in 32 bits: in bytes, and in numbers of two bytes.
BEHIND_BYTES = (1 << 31) + (1 << 20)
BEHIND_NUMBERS = (1 << 32) + (1 << 20)


@dataclass(frozen=True)
class Checked:
    """A scene to check.

    Attributes:
        shape: the scene's.
        dtype: of pages and queries.
        bytes_before: bytes of others' pages before the scene's.

    """

    shape: SceneShape
    dtype: torch.dtype = BF16
    bytes_before: int = 0


def checked_scenes(tiny: bool) -> dict[str, Checked]:
    """Scenes to check, by name."""
    if tiny:
        prompts = SceneShape(2, 7, 24, 9, Heads(2, 2, 32), decodes=False)
        decodes = replace(prompts, decodes=True)
        grouped = Heads(4, 2, 32)
        return {
            "prefill": Checked(prompts, FLOAT32),
            "prefill, kept rows": Checked(replace(prompts, kept=3, heads=grouped), FLOAT32),
            "decode": Checked(decodes, FLOAT32),
            "decode, grouped heads, padded, behind others' pages": Checked(
                replace(decodes, requests=3, padding=1, heads=grouped), FLOAT32, 1 << 16
            ),
        }
    prompts = SceneShape(2, 90, 576, 60, SEVEN_B, decodes=False)
    decodes = replace(prompts, requests=5, decodes=True)
    found = {}
    for step, shape in (("prefill", prompts), ("decode", decodes)):
        for live in (1, *LIVES, 576):
            found[f"{step}, {live} live"] = Checked(replace(shape, live=live))
        found |= {
            f"{step}, kept rows": Checked(replace(shape, live=195, kept=98)),
            f"{step}, grouped heads": Checked(replace(shape, heads=GROUPED)),
            f"{step}, float32": Checked(shape, FLOAT32),
            f"{step}, small heads, float32": Checked(replace(shape, heads=SMALL), FLOAT32),
            f"{step}, small heads": Checked(replace(shape, heads=SMALL)),
            f"{step}, behind 2^31 bytes": Checked(shape, bytes_before=BEHIND_BYTES),
            f"{step}, behind 2^31 numbers": Checked(shape, bytes_before=BEHIND_NUMBERS),
        }
    found["decode, padded"] = Checked(replace(decodes, requests=3, padding=1))
    found["decode, padded, grouped heads"] = Checked(replace(decodes, requests=5, padding=3, heads=GROUPED))
    return found


def timed_scenes(tiny: bool) -> dict[str, SceneShape]:
    """Scenes to time, by name: the shape served, in bf16."""
    if tiny:
        shape = SceneShape(2, 7, 24, 9, Heads(2, 2, 32), decodes=False)
        return {"prefill, 2 x 7 live": shape, "decode, 2 x 7 live": replace(shape, decodes=True)}
    return {
        f"{step}, {requests} x {live} live": SceneShape(requests, live, 576, 60, SEVEN_B, step == "decode")
        for step, counts in (("prefill", (1, 16)), ("decode", (1, 16, 64)))
        for requests in counts
        for live in LIVES
    }


# Small, because a sanitizer slows every access down.
SANITIZED = (
    SceneShape(2, 7, 24, 9, SMALL, decodes=False),
    SceneShape(2, 7, 24, 9, SMALL, decodes=False, kept=3),
    SceneShape(3, 7, 24, 9, SMALL, decodes=True, padding=1),
)


@dataclass(frozen=True)
class CheckedTower:
    """A scene of the tower to check.

    Attributes:
        shape: the scene's.
        dtype: of features, queries, keys and values.

    """

    shape: TowerShape
    dtype: torch.dtype = BF16


@dataclass(frozen=True)
class TimedTower:
    """A batch of pictures in a layer of the tower, to time.

    Attributes:
        images: how many.
        live: tokens that are left of each behind the last layer, on average.
        layer: the layer, counted from 1.
        layers: of the tower.
        patches: of an image.
        heads: shape of the attention.

    """

    images: int
    live: int
    layer: int
    layers: int = VIT_L_LAYERS
    patches: int = VIT_L_PATCHES
    heads: TowerHeads = VIT_L

    @property
    def lengths(self) -> list[list[int]]:
        """Tokens of every image before the first layer and behind each."""
        return tower_lengths(self.images, self.live, self.patches, self.layers)

    @property
    def shape(self) -> TowerShape:
        """The scene of the layer: one merge."""
        stages = slice(self.layer - 1, self.layer + 1)
        lengths, rows = self.lengths, granted_rows(self.lengths)
        return TowerShape(self.heads, self.patches, tuple(map(tuple, lengths[stages])), tuple(rows[stages]))

    @property
    def tokens(self) -> int:
        """Tokens of an image before the layer's merge, class token not counted, on average."""
        return round(sum(self.lengths[self.layer - 1]) / self.images) - 1


def _merging(heads: TowerHeads, patches: int, images: Sequence[Sequence[int]], room: int) -> TowerShape:
    """Unmerged images of which some lengths are left behind each layer, and so many rows more than that."""
    lengths = tuple(zip(*([patches + 1, *left] for left in images), strict=True))
    rows = (sum(lengths[0]), *(sum(stage) + room for stage in lengths[1:]))
    return TowerShape(heads, patches, lengths, rows)


# Of each image the tokens behind every layer: as pictures merge, as far as may be, not at all, and in bursts.
IMAGES = (
    (520, 420, 330, 230),
    (289, 145, 73, 37),
    (577, 577, 577, 577),
    (577, 300, 300, 151),
    (576, 500, 499, 250),
)
TINY_IMAGES = ((20, 15, 11), (13, 7, 4), (25, 25, 25), (24, 13, 12))


def checked_towers(tiny: bool) -> dict[str, CheckedTower]:
    """Scenes of the tower to check, by name; behind the tokens are rows of padding, or too few rows."""
    if tiny:
        odd = _merging(TowerHeads(3, 20), 24, TINY_IMAGES, room=9)
        cut = _merging(SMALL_TOWER, 24, TINY_IMAGES, room=0)
        return {
            "tower, padding": CheckedTower(odd, FLOAT32),
            "tower, more tokens than rows": CheckedTower(_short_of_rows(cut, 8), FLOAT32),
        }
    shape = _merging(VIT_L, VIT_L_PATCHES, IMAGES, room=100)
    tight = _merging(VIT_L, VIT_L_PATCHES, IMAGES, room=0)
    small = _merging(SMALL_TOWER, VIT_L_PATCHES, IMAGES, room=100)
    found: dict[str, CheckedTower] = {}
    for dtype in (BF16, FLOAT32):
        name = str(dtype).removeprefix("torch.")
        found |= {
            f"tower, {name}": CheckedTower(shape, dtype),
            f"tower, {name}, more tokens than rows": CheckedTower(_short_of_rows(tight, 300), dtype),
            f"tower, {name}, small heads": CheckedTower(small, dtype),
        }
    one = _merging(VIT_L, VIT_L_PATCHES, IMAGES[:1], room=0)
    return found | {
        "tower, one image": CheckedTower(one),
        "tower, every row taken": CheckedTower(tight),
        "tower, 25 images in its middle": CheckedTower(TimedTower(25, 90, 12).shape),
    }


def _short_of_rows(shape: TowerShape, missing: int) -> TowerShape:
    """The same images with too few rows behind the second merge and all that follow."""
    return replace(shape, rows=(*shape.rows[:2], *(rows - missing for rows in shape.rows[2:])))


def timed_towers(tiny: bool) -> dict[str, TimedTower]:
    """Layers of the tower to time, by name, in bf16; pictures that leave 90 tokens on average."""
    if tiny:
        return {"tower, 2 images, layer 3": TimedTower(2, 9, 3, layers=3, patches=24, heads=SMALL_TOWER)}
    batches = ((1, VIT_L_LAYERS // 2), (25, 1), (25, VIT_L_LAYERS // 2), (25, VIT_L_LAYERS))
    return {
        f"tower, {images} images, layer {layer}": TimedTower(images, 90, layer) for images, layer in batches
    }


# The last has too few rows.
SANITIZED_TOWERS = (
    _merging(SMALL_TOWER, 24, TINY_IMAGES, room=9),
    _short_of_rows(_merging(SMALL_TOWER, 24, TINY_IMAGES, room=0), 8),
)
