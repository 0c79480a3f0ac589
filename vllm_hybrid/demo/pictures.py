"""Pictures drawn by code, from a plain wall to noise, to send to a server.

The same seed draws the same pictures (text as far as Pillow's built-in font is the same).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# fmt: off
WORDS = (
    "about", "after", "again", "apple", "autumn", "bread", "bridge", "bright", "candle", "castle",
    "cloud", "corner", "dinner", "early", "evening", "field", "forest", "garden", "gentle", "harbour",
    "house", "island", "journey", "kitchen", "ladder", "letter", "little", "market", "meadow",
    "morning", "mountain", "number", "ocean", "orange", "paper", "pepper", "quiet", "river", "sailor",
    "school", "silver", "simple", "station", "stone", "street", "summer", "table", "thunder", "travel",
    "under", "valley", "village", "water", "window", "winter", "wooden", "yellow",
)
# fmt: on


def pictures(seed: int = 0) -> dict[str, Image.Image]:
    """One picture of every kind by name, the plainest first, RGB, of different sizes."""
    return {name: draw(random.Random(f"{name} {seed}")) for name, draw in KINDS.items()}


def write_pictures(folder: str | Path, seeds: int = 1) -> list[Path]:
    """Write the pictures of seeds 0 .. seeds - 1 as PNG files into a folder that is made.

    Returns:
        The files, ``NAME.png`` for seed 0 and ``NAME-SEED.png`` for others.

    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for seed in range(seeds):
        for name, picture in pictures(seed).items():
            files.append(folder / (f"{name}-{seed}.png" if seed else f"{name}.png"))
            picture.save(files[-1])
    return files


def _colour(draw: random.Random) -> Colour:
    return draw.randrange(256), draw.randrange(256), draw.randrange(256)


def _wall(draw: random.Random) -> Image.Image:
    return Image.new("RGB", (336, 336), _colour(draw))


def _gradient(draw: random.Random) -> Image.Image:
    """Two colours that run into each other in a random direction."""
    width, height = 480, 360
    slant = draw.uniform(0, 1)
    across = np.linspace(0, slant, width)[None, :, None] + np.linspace(0, 1 - slant, height)[:, None, None]
    start, end = np.array(_colour(draw)), np.array(_colour(draw))
    return Image.fromarray((start * (1 - across) + end * across).round().astype(np.uint8))


def _sky(draw: random.Random) -> Image.Image:
    """Sky, ground and a sun."""
    image = Image.new("RGB", (448, 336), (120, 170, draw.randrange(210, 256)))
    canvas = ImageDraw.Draw(image)
    horizon = draw.randrange(180, 260)
    canvas.rectangle((0, horizon, 448, 336), fill=(60, draw.randrange(110, 170), 50))
    x, y = draw.randrange(40, 340), draw.randrange(20, 100)
    canvas.ellipse((x, y, x + 60, y + 60), fill=(250, 220, 80))
    return image


def _shapes(count: int) -> Callable[[random.Random], Image.Image]:
    def draw_shapes(draw: random.Random) -> Image.Image:
        image = Image.new("RGB", (400, 400), _colour(draw))
        canvas = ImageDraw.Draw(image)
        size = (60, 130) if count < 10 else (25, 70)
        for number in range(count):
            side = draw.randrange(*size)
            x, y = draw.randrange(400 - side), draw.randrange(400 - side)
            _shape(canvas, number % 3, (x, y, x + side, y + side), _colour(draw))
        return image

    return draw_shapes


def _shape(canvas: ImageDraw.ImageDraw, kind: int, box: tuple[int, int, int, int], colour: Colour) -> None:
    left, top, right, bottom = box
    if kind == 0:
        canvas.ellipse(box, fill=colour)
    elif kind == 1:
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)


def _houses(draw: random.Random) -> Image.Image:
    """A street of houses with windows."""
    image = Image.new("RGB", (640, 480), (150, 190, 230))
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 400, 640, 480), fill=(90, 90, 95))
    left = 0
    while left < 640:
        right, top = left + draw.randrange(70, 130), draw.randrange(60, 220)
        canvas.rectangle((left, top, right, 400), fill=_colour(draw))
        for x in range(left + 12, right - 20, 30):
            for y in range(top + 16, 370, 40):
                canvas.rectangle((x, y, x + 14, y + 22), fill=draw.choice([(250, 240, 170), (40, 50, 70)]))
        left = right
    return image


def _text(draw: random.Random) -> Image.Image:
    """A printed page."""
    image = Image.new("RGB", (420, 480), (250, 249, 244))
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=18)
    for y in range(24, 440, 27):
        line = draw.choice(WORDS)
        while canvas.textlength(longer := f"{line} {draw.choice(WORDS)}", font=font) < 370:
            line = longer
        canvas.text((24, y), line, fill=(25, 25, 30), font=font)
    return image


def _noise(draw: random.Random) -> Image.Image:
    """Coloured blocks that differ from each other, under finer noise: little to merge."""
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    fine = np.random.default_rng(draw.randrange(2**32)).integers(-40, 41, (336, 336, 3))
    coarse = pixels.repeat(12, axis=0).repeat(12, axis=1).astype(np.int64)
    return Image.fromarray((coarse + fine).clip(0, 255).astype(np.uint8))


KINDS: dict[str, Callable[[random.Random], Image.Image]] = {
    "wall": _wall,
    "gradient": _gradient,
    "sky": _sky,
    "shapes": _shapes(4),
    "crowd": _shapes(60),
    "houses": _houses,
    "page": _text,
    "noise": _noise,
}
