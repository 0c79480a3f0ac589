"""What attention over pages with holes is given: one tier's batch, virtual key lists, page rows, rotation.

Every implementation (``reference``, ``cpu``, ``gpu``) works on these and imports no other implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_hybrid.method.row_plan import RowPlan


@dataclass
class VirtualKeys:
    """The virtual key lists of a batch of requests, in the order rows stand in the pages.

    Attributes:
        row_ptr: int64 [requests + 1], a request's stretch of rows.
        row_page: int64 [rows], page row of each row: block * rows_per_block + offset.
        row_image: bool [rows], whether the row is an image token (its key is stored unrotated).
        member_ptr: int64 [rows + 1], a row's stretch of members.
        member_pos: int64 [keys], the virtual positions a row stands at, ascending inside a row.

    """

    row_ptr: torch.Tensor
    row_page: torch.Tensor
    row_image: torch.Tensor
    member_ptr: torch.Tensor
    member_pos: torch.Tensor


@dataclass
class TierBatch:
    """What one tier's attention needs to know about a step.

    Attributes:
        plan: the live rows of the step.
        positions: int64 [N], virtual position of each virtual row.
        query_start: a request's stretch of virtual rows: query_start[r] .. query_start[r + 1].
        query_ptr: int32 [requests + 1], query_start where the rows are.
        page_slots: int64 [R], page row each live row's keys and values are written to.
        keys: virtual key lists of all requests, this step's rows included, in the form of the
            implementation that read them.
        ranked: requests whose last query ranks image tokens in this step (FastV).
        mass: float32 [R] once the ranking layer has run: attention each live row of the step received
            from its request's last query, summed over the heads at hand; zero for requests not ranked.

    """

    plan: RowPlan
    positions: torch.Tensor
    query_start: list[int]
    query_ptr: torch.Tensor
    page_slots: torch.Tensor
    keys: Any
    ranked: list[int]
    mass: torch.Tensor | None = None

    def live_stretch(self, request: int) -> tuple[int, int]:
        """First and one past the last live row of a request in this step; they are consecutive."""
        begin, end = self.query_start[request], self.query_start[request + 1]
        bounds = torch.searchsorted(self.plan.rows, torch.tensor([begin, end], device=self.plan.rows.device))
        first, last = bounds.tolist()
        return first, last


def rotation_angles(inverse_frequency: torch.Tensor, positions: int) -> torch.Tensor:
    """Cosines and sines of RoPE's angles for positions 0 .. positions - 1.

    Args:
        inverse_frequency: float [head_size / 2], radians per position.
        positions: how many positions.

    Returns:
        float32 [positions, head_size], the cosines followed by the sines (RoFormer, arXiv 2104.09864).

    """
    angle = torch.arange(positions, device=inverse_frequency.device)[:, None] * inverse_frequency.float()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE in half-split style.

    Args:
        x: [..., n, heads, head_size].
        angles: float32 [n, head_size] of :func:`rotation_angles`, one row per entry of n.

    Returns:
        float32, the shape of x.

    """
    cos, sin = angles[..., None, :].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def page_rows(kv_cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """All slots of one layer's pages as rows that can be gathered and scattered by one index.

    Args:
        kv_cache: the layer's view [blocks, kv_heads, block_size, 2 * head_size] of a cache in which the
            block is outermost and a slot's heads lie together (layout BLNHC).

    Returns:
        rows [rows, kv_heads, 2 * head_size], a view whose row ``block * step + offset`` is the slot
        ``offset`` of the block, and the step.

    Raises:
        ValueError: the cache has another layout.

    """
    blocks, heads, block_size, width = kv_cache.shape
    block_stride, head_stride, slot_stride, unit = kv_cache.stride()
    slot = heads * width
    if unit != 1 or head_stride not in (width, slot) or slot_stride != slot or block_stride % slot:
        raise ValueError(
            f"KV cache strides {kv_cache.stride()} of shape {tuple(kv_cache.shape)} are not those of layout "
            "BLNHC; unset VLLM_KV_CACHE_LAYOUT"
        )
    step = block_stride // slot
    rows = (blocks - 1) * step + block_size
    return kv_cache.as_strided((rows, heads, width), (slot, width, 1), kv_cache.storage_offset()), step
