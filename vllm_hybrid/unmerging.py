"""Virtual token unmerging: attention as if each merged token stood at all of its patches' positions.

This file holds the plain torch implementation, the readable oracle of the fast ones. Every implementation
offers the same two functions over the same :class:`TierBatch`:

* ``attend``: keys enter the softmax once per member position, rotated to it; a merged token's query
  attends once per member position, causally by virtual position, and its output is the mean over the
  copies (DyMU, arXiv 2504.17040, section 3.2, without materialising the sequence in any linear layer).
* ``attention_mass``: what the last query of a request gives to each of its rows (FastV's importance).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .planning import RowPlan, VirtualKeys


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


def write_pages(key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Store the keys and values of a step's live rows.

    Args:
        key: [R, kv_heads, head_size], image rows unrotated.
        value: [R, kv_heads, head_size].
        pages: rows of :func:`page_rows`.
        slots: int64 [R], page row of each.

    """
    pages.index_copy_(0, slots, torch.cat([key, value], dim=-1).to(pages.dtype))


def _virtual_queries(
    query: torch.Tensor, batch: TierBatch, request: int, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, positions and rotated copies of one request's queries, one per virtual position."""
    stretch = slice(batch.query_start[request], batch.query_start[request + 1])
    row = batch.plan.row_of[stretch]
    kept = row >= 0
    row, position = row[kept], batch.positions[stretch][kept]
    copies = query[row].float()
    turned = rotate(copies, angles[position])
    is_image = batch.plan.image[row] >= 0
    return row, position, torch.where(is_image[:, None, None], turned, copies)


def _virtual_keys(
    pages: torch.Tensor, keys: VirtualKeys, request: int, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row numbers, positions, keys and values of one request, one per virtual position."""
    rows = torch.arange(int(keys.row_ptr[request]), int(keys.row_ptr[request + 1]))
    row = rows.repeat_interleave((keys.member_ptr[1:] - keys.member_ptr[:-1])[rows])
    members = slice(
        int(keys.member_ptr[keys.row_ptr[request]]), int(keys.member_ptr[keys.row_ptr[request + 1]])
    )
    position = keys.member_pos[members]
    key, value = pages[keys.row_page[row]].float().chunk(2, dim=-1)
    turned = rotate(key, angles[position])
    return row, position, torch.where(keys.row_image[row][:, None, None], turned, key), value


def _softmax(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention probabilities [heads, queries, keys]; every group of query heads shares a key head."""
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: TierBatch,
    angles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Virtual unmerging attention of every live row of a step.

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        pages: rows of :func:`page_rows`, this step's keys and values written.
        batch: the step.
        angles: float32 [positions, head_size] of :func:`rotation_angles`.
        scale: factor on the scores.
        out: [R, heads, head_size], written.

    """
    for request in range(len(batch.query_start) - 1):
        row, position, copies = _virtual_queries(query, batch, request, angles)
        if row.numel() == 0:
            continue
        _, key_position, key, value = _virtual_keys(pages, batch.keys, request, angles)
        weight = _softmax(copies, key, key_position <= position[:, None], scale)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        result = torch.einsum("hqk,khd->qhd", weight, value)
        first, last = batch.live_stretch(request)
        total = torch.zeros(last - first, *query.shape[1:])
        total.index_add_(0, row - first, result)
        copies_of = torch.bincount(row - first, minlength=last - first)
        out[first:last] = (total / copies_of[:, None, None]).to(out.dtype)


def attention_mass(
    query: torch.Tensor, pages: torch.Tensor, batch: TierBatch, angles: torch.Tensor, scale: float
) -> torch.Tensor:
    """What each ranked request's last query gives to the live rows of the step (FastV, section 3.2).

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        pages: rows of :func:`page_rows`, this step's keys and values written.
        batch: the step; ``batch.ranked`` names the requests.
        angles: float32 [positions, head_size].
        scale: factor on the scores.

    Returns:
        float32 [R]: attention mass summed over the given heads and each row's member positions; zero
        for rows of other requests.

    """
    mass = torch.zeros(query.shape[0])
    for request in batch.ranked:
        _, position, copies = _virtual_queries(query, batch, request, angles)
        row, key_position, key, _ = _virtual_keys(pages, batch.keys, request, angles)
        weight = _softmax(copies[-1:], key, key_position <= position[-1:, None], scale)[:, 0].sum(0)
        received = torch.zeros(int(batch.keys.row_ptr[-1])).index_add_(0, row, weight)
        first, last = batch.live_stretch(request)
        end = int(batch.keys.row_ptr[request + 1])
        mass[first:last] = received[end - (last - first) : end]
    return mass
