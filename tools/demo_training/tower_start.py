"""Where the tower starts from: a vision transformer learns much faster when it starts like a convolution.

Its channels are split. Most hold what a patch shows, in cosine waves as JPEG has them; the others hold where
it is, in sines and cosines. Every head compares positions alone and so looks at patches a step away in a
direction of its own. All of it is learned from there on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vllm_hybrid.demo.model import SHAPE

GRID = SHAPE.image_size // SHAPE.patch_size
# A head compares as many channels as it has.
_PLACE = SHAPE.head_size
_CONTENT = SHAPE.vision_width - _PLACE
_FREQUENCIES = _PLACE // 4
# Content is about as loud as positions.
_LOUDNESS = 3.0
_SHARPNESS = 0.9
# Patches; later layers look farther.
_STEP, _STRIDE = 1.0, 0.4


@torch.no_grad()
def start_tower(tower: Any) -> None:
    """Set filters, positions and what heads compare."""
    embeddings = tower.embeddings
    embeddings.patch_embedding.weight.zero_()[:_CONTENT] = _cosine_filters()
    embeddings.position_embedding.weight.zero_()[1:, _CONTENT:] = _positions()
    number = 0
    for depth, layer in enumerate(tower.encoder.layers):
        attention = layer.self_attn
        for head in range(attention.num_heads):
            rows = slice(head * SHAPE.head_size, (head + 1) * SHAPE.head_size)
            # The golden angle: the directions of any few heads in a row are spread out.
            angle = number * math.pi * (3 - math.sqrt(5))
            distance = _STEP + _STRIDE * depth
            step = distance * math.sin(angle), distance * math.cos(angle)
            attention.k_proj.weight[rows, _CONTENT:] += _SHARPNESS * torch.eye(_PLACE)
            attention.q_proj.weight[rows, _CONTENT:] += _SHARPNESS * _moved(*step)
            number += 1


def _cosine_filters() -> Tensor:
    """Filters [content, 3, patch, patch]: slow cosine waves, half of brightness, half of opponent colours."""
    along = (torch.arange(SHAPE.patch_size) + 0.5) / SHAPE.patch_size
    waves = torch.stack([torch.cos(math.pi * n * along) for n in range(8)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    opponents = torch.tensor([[1.0, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])
    opponents = opponents / opponents.norm(dim=1, keepdim=True)
    slowest = sorted(((u, v) for u in range(8) for v in range(8)), key=lambda wave: (sum(wave), wave))
    filters = []
    for opponent, count in zip(opponents, (_CONTENT // 2, _CONTENT // 4, _CONTENT // 4), strict=True):
        for u, v in slowest[:count]:
            # Pictures have little of the fast waves.
            gain = (1 + u + v) * _LOUDNESS / SHAPE.patch_size
            filters.append(gain * opponent[:, None, None] * waves[u][:, None] * waves[v])
    return torch.stack(filters)


def _angles() -> Tensor:
    """Radians a patch of each frequency, fast to slow."""
    return 2 * math.pi / torch.logspace(math.log10(4), math.log10(3 * GRID), _FREQUENCIES)


def _positions() -> Tensor:
    """Position embeddings [patches, place]: sines and cosines of the row, then of the column."""
    along = torch.arange(GRID)[:, None] * _angles()
    waves = torch.cat([along.sin(), along.cos()], 1)
    rows, columns = waves[:, None].expand(GRID, GRID, -1), waves[None].expand(GRID, GRID, -1)
    return torch.cat([rows, columns], -1).reshape(GRID * GRID, _PLACE)


def _moved(down: float, right: float) -> Tensor:
    """The matrix [place, place] that takes a position's embedding to that of the position so far away."""
    blocks = []
    for distance in (down, right):
        turn = _angles() * distance
        cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
        blocks.append(torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)]))
    return torch.block_diag(*blocks)
