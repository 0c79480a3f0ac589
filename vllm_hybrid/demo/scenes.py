"""Synthetic pictures: a few large coloured shapes, letters and digits on plain to cluttered backgrounds.

The demo model is trained, calibrated and examined on them. Every thing lies in a cell of its own of a 3 x 3
grid, so that where it is has a name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID = 3
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "middle",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 228, 50),
    "green": (35, 160, 60),
    "blue": (35, 80, 220),
    "purple": (140, 45, 170),
    "white": (246, 246, 246),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIGITS = tuple("0123456789")
# No two of them, nor any of the digits, are hard to tell apart.
LETTERS = tuple("ACEHKMPTXY")
KINDS = (*SHAPES, *DIGITS, *LETTERS)

MOST_THINGS = 4
# Drawn larger than they are and shrunk, for smooth edges.
_OVERSAMPLING = 2
# Two digits or letters of one picture are rarer than shapes: the few shapes need fewer examples each.
_GLYPH_SHARE = 0.4
_REPEATING_SHARE = 0.35
_COLOUR_JITTER = 10


def kind_name(kind: str) -> str:
    """What to call a kind: circle, letter A, digit 7."""
    if kind in LETTERS:
        return f"letter {kind}"
    return f"digit {kind}" if kind in DIGITS else kind


@dataclass(frozen=True)
class Thing:
    """A shape or a glyph: what it is, its colour, its cell and its bounding box in pixels."""

    kind: str
    colour: str
    cell: int
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        """Name of the cell."""
        return PLACES[self.cell]

    @property
    def name(self) -> str:
        """What to call it."""
        return kind_name(self.kind)


@dataclass(frozen=True)
class Scene:
    """A picture [side, side, 3] of bytes and the things in it, in the order in which one reads."""

    pixels: np.ndarray
    things: tuple[Thing, ...]


def draw_scene(seed: list[int], side: int = 336, most: int = MOST_THINGS) -> Scene:
    """Draw the picture of a seed.

    Args:
        seed: any integers; the same ones draw the same picture.
        side: of the picture in pixels, a multiple of 3.
        most: things at most, up to 9; 1 to ``most`` are equally likely.

    """
    rng = np.random.default_rng(seed)
    canvas = Image.fromarray(_background(rng, side))
    things = _things(rng, side, int(rng.integers(1, most + 1)))
    for thing in things:
        _draw(canvas, thing, rng)
    pixels = np.array(canvas)
    if rng.random() < 0.2:
        pixels = _noisy(rng, pixels, int(rng.integers(5, 40)))
    return Scene(pixels, things)


def _things(rng: np.random.Generator, side: int, count: int) -> tuple[Thing, ...]:
    kinds, colours = _choices(rng)
    made = []
    for cell in sorted(rng.choice(GRID * GRID, count, replace=False).tolist()):
        glyph = rng.random() < _GLYPH_SHARE
        kind = str(rng.choice([k for k in kinds if (k not in SHAPES) == glyph] or kinds))
        made.append(Thing(kind, str(rng.choice(colours)), cell, _box(rng, cell, side // GRID)))
    return tuple(made)


def _choices(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Kinds and colours of one picture: all, or so few that they repeat and can be counted."""
    kinds, colours = list(KINDS), list(COLOURS)
    if rng.random() < _REPEATING_SHARE:
        shapes = rng.choice(SHAPES, int(rng.integers(1, 3)), replace=False).tolist()
        glyphs = rng.choice((*DIGITS, *LETTERS), int(rng.integers(0, 2)), replace=False).tolist()
        kinds = shapes + glyphs
    if rng.random() < _REPEATING_SHARE:
        colours = rng.choice(colours, int(rng.integers(1, 3)), replace=False).tolist()
    return kinds, colours


def _box(rng: np.random.Generator, cell: int, room: int) -> tuple[int, int, int, int]:
    """A random square box inside the cell, 58 to 95% of its side."""
    size = round(room * rng.uniform(0.58, 0.95))
    left = cell % GRID * room + int(rng.integers(0, room - size + 1))
    top = cell // GRID * room + int(rng.integers(0, room - size + 1))
    return left, top, left + size, top + size


def _draw(canvas: Image.Image, thing: Thing, rng: np.random.Generator) -> None:
    size = thing.box[2] - thing.box[0]
    mask = _glyph(thing.kind, size) if thing.kind not in SHAPES else _shape(thing.kind, size, rng)
    jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, 3)
    colour = (np.array(COLOURS[thing.colour]) + jitter).clip(0, 255)
    canvas.paste(tuple(colour.tolist()), thing.box[:2], mask)


def _shape(kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    """The shape's mask [size, size], turned a little."""
    large = size * _OVERSAMPLING
    mask = Image.new("L", (large, large))
    if kind == "circle":
        ImageDraw.Draw(mask).ellipse((0, 0, large - 1, large - 1), fill=255)
    else:
        turn = math.radians(rng.uniform(-12, 12))
        corners = [(large * (x + 1) / 2, large * (y + 1) / 2) for x, y in _corners(kind, turn)]
        ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def _corners(kind: str, turn: float) -> list[tuple[float, float]]:
    """Corners of the turned shape, stretched to fill the square from -1 to 1."""
    cos, sin = math.cos(turn), math.sin(turn)
    turned = np.array([(x * cos - y * sin, x * sin + y * cos) for x, y in _UPRIGHT[kind]])
    low, high = turned.min(0), turned.max(0)
    scale = 2 / (high - low).max()
    return [(float(x), float(y)) for x, y in (turned - (low + high) / 2) * scale]


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42)
    return [
        (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5))
        for i in range(10)
    ]


_ARM = 0.33
_UPRIGHT: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "star": _star(),
    "cross": [
        (-_ARM, -1),
        (_ARM, -1),
        (_ARM, -_ARM),
        (1, -_ARM),
        (1, _ARM),
        (_ARM, _ARM),
        (_ARM, 1),
        (-_ARM, 1),
        (-_ARM, _ARM),
        (-1, _ARM),
        (-1, -_ARM),
        (-_ARM, -_ARM),
    ],
}


@functools.lru_cache(maxsize=4096)
def _glyph(kind: str, size: int) -> Image.Image:
    """The letter's or digit's mask [size, size] in a heavy hand of Pillow's own font, filling the height."""
    font = ImageFont.load_default(size)
    stroke = max(1, size // 28)
    left, top, right, bottom = font.getbbox(kind, stroke_width=stroke)
    glyph = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), kind, fill=255, font=font, stroke_width=stroke)
    scale = size / max(glyph.size)
    fitted = glyph.resize([max(1, round(n * scale)) for n in glyph.size], Image.Resampling.BILINEAR)
    mask = Image.new("L", (size, size))
    mask.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return mask


# ---- backgrounds ----------------------------------------------------------------------------------


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """A background [side, side, 3] of bytes: a base and, half the time, clutter on it."""
    bases: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (
        _plain,
        _plain,
        _gradient,
        _stripes,
        _checks,
        _blotches,
    )
    pixels = bases[int(rng.integers(len(bases)))](rng, side)
    if rng.random() < 0.5:
        pixels = (_lines, _dots)[int(rng.integers(2))](rng, pixels)
    return _noisy(rng, pixels, int(rng.integers(5, 50))) if rng.random() < 0.2 else pixels


def _muted(rng: np.random.Generator, spread: int = 30) -> np.ndarray:
    """A colour [3] near grey, far from those of things."""
    return (rng.integers(95, 185) + rng.integers(-spread, spread + 1, 3)).astype(np.float32)


def _plain(rng: np.random.Generator, side: int) -> np.ndarray:
    return np.broadcast_to(_muted(rng), (side, side, 3)).astype(np.uint8)


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    slant = rng.uniform(0, 1)
    along = np.linspace(0, 1, side, dtype=np.float32)
    share = (slant * along[None] + (1 - slant) * along[:, None])[..., None]
    return (_muted(rng) * (1 - share) + _muted(rng) * share).astype(np.uint8)


def _stripes(rng: np.random.Generator, side: int) -> np.ndarray:
    along, width = np.arange(side), int(rng.integers(4, 24))
    dark = along[None] + (along[:, None] * int(rng.integers(-1, 2)))
    odd = (dark // width % 2).astype(bool)
    if rng.random() < 0.5:
        odd = odd.T
    return np.where(odd[..., None], _muted(rng), _muted(rng)).astype(np.uint8)


def _checks(rng: np.random.Generator, side: int) -> np.ndarray:
    cells = np.arange(side) // int(rng.integers(7, 40))
    odd = (cells[None] + cells[:, None]) % 2 == 1
    return np.where(odd[..., None], _muted(rng), _muted(rng)).astype(np.uint8)


def _blotches(rng: np.random.Generator, side: int) -> np.ndarray:
    count = int(rng.integers(4, 30))
    small = (_muted(rng) + rng.integers(-25, 26, (count, count, 3))).clip(0, 255).astype(np.uint8)
    return np.array(Image.fromarray(small).resize((side, side), Image.Resampling.BILINEAR))


def _lines(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    canvas, side = ImageDraw.Draw(image), len(pixels)
    for _ in range(int(rng.integers(3, 30))):
        ends = rng.integers(0, side, 4).tolist()
        canvas.line(ends, fill=tuple(_muted(rng, 60).astype(int).tolist()), width=int(rng.integers(1, 4)))
    return np.array(image)


def _dots(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    canvas, side = ImageDraw.Draw(image), len(pixels)
    for x, y in rng.integers(0, side, (int(rng.integers(10, 120)), 2)).tolist():
        radius = int(rng.integers(1, 6))
        colour = tuple(_muted(rng, 60).astype(int).tolist())
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return np.array(image)


def _noisy(rng: np.random.Generator, pixels: np.ndarray, strength: int) -> np.ndarray:
    noise = rng.integers(-strength, strength + 1, pixels.shape, dtype=np.int16)
    return (pixels + noise).clip(0, 255).astype(np.uint8)
