"""Pictures of what was merged and dropped, for people to look at."""

from __future__ import annotations

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 2
_BORDER = (255, 255, 255)
_FADED = 0.2
_MARGIN = 12


def merged_regions(picture: Image.Image, owner: np.ndarray) -> Image.Image:
    """Every live token as one region in its mean colour, with white borders between regions.

    Args:
        picture: RGB, as the tower sees it, [side, side] pixels.
        owner: int [patches], the live token that holds each patch; patches form a square.

    Returns:
        RGB, ``SCALE`` times as large.

    """
    grid, pixels = _grid(picture, owner), np.asarray(picture.convert("RGB"), dtype=np.float64)
    token = _to_pixels(grid, picture)
    painted = np.empty_like(pixels)
    for number in np.unique(token):
        inside = token == number
        painted[inside] = pixels[inside].mean(axis=0)
    return _with_borders(painted, grid)


def kept_regions(picture: Image.Image, owner: np.ndarray, kept: np.ndarray) -> Image.Image:
    """The picture with the regions of dropped tokens faded.

    Args:
        picture: RGB, as the tower sees it.
        owner: int [patches], the live token that holds each patch.
        kept: bool [live tokens].

    Returns:
        RGB, ``SCALE`` times as large.

    """
    grid, pixels = _grid(picture, owner), np.asarray(picture.convert("RGB"), dtype=np.float64)
    stays = kept[_to_pixels(grid, picture)]
    grey = pixels.mean(axis=2, keepdims=True)
    return _with_borders(np.where(stays[..., None], pixels, 255 - (255 - grey) * _FADED), grid)


def side_by_side(panels: dict[str, Image.Image], lines: list[str]) -> Image.Image:
    """Panels beside one another with a title above each, and lines of text below all of them."""
    font = ImageFont.load_default(18)
    width = sum(panel.width + _MARGIN for panel in panels.values()) + _MARGIN
    wrapped = [piece for line in lines for piece in textwrap.wrap(line, width // 9) or [""]]
    top, step = 40, 26
    height = top + max(panel.height for panel in panels.values()) + 2 * _MARGIN + step * len(wrapped)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN
    for title, panel in panels.items():
        draw.text((left, _MARGIN), title, fill="black", font=font)
        sheet.paste(panel, (left, top))
        left += panel.width + _MARGIN
    below = height - _MARGIN - step * len(wrapped)
    for number, line in enumerate(wrapped):
        draw.text((_MARGIN, below + step * number), line, fill="black", font=font)
    return sheet


def enlarged(picture: Image.Image) -> Image.Image:
    """The picture at the size of the other panels."""
    return picture.convert("RGB").resize(
        (picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST
    )


def _grid(picture: Image.Image, owner: np.ndarray) -> np.ndarray:
    side = round(len(owner) ** 0.5)
    if side * side != len(owner) or picture.width != picture.height or picture.width % side:
        raise ValueError(f"{len(owner)} patches do not tile a picture of {picture.size} pixels as a square")
    return np.asarray(owner).reshape(side, side)


def _to_pixels(grid: np.ndarray, picture: Image.Image) -> np.ndarray:
    size = picture.width // len(grid)
    return grid.repeat(size, axis=0).repeat(size, axis=1)


def _with_borders(pixels: np.ndarray, grid: np.ndarray) -> Image.Image:
    image = enlarged(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)))
    draw = ImageDraw.Draw(image)
    size = image.width // len(grid)
    for row, column in zip(*np.nonzero(grid[:, 1:] != grid[:, :-1]), strict=True):
        x = (column + 1) * size
        draw.line([(x, row * size), (x, (row + 1) * size)], fill=_BORDER)
    for row, column in zip(*np.nonzero(grid[1:] != grid[:-1]), strict=True):
        y = (row + 1) * size
        draw.line([(column * size, y), ((column + 1) * size, y)], fill=_BORDER)
    return image
