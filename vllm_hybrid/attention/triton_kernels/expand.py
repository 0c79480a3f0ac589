"""Queries and keys at all their virtual positions, rotated, in memory: what dense attention reads.

To move per virtual key: key and value once in, from the cache where a row stands at several positions, and
once out; a row of cosines and sines (4 * head_size bytes) for every few heads of an image key. Per virtual
query the same without a value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.lists import KeyLists, QueryLists

_TILE = 8
_HEADS = 8


@triton.jit
def _rotated(
    base, row, pos, out, out_row, there, cos_sin_cache, row_stride, head_stride, out_stride, out_head_stride,
    heads, HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """Store the heads of some rows [TILE], rotated to their positions; position 0 rotates nothing."""
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)[None, :, None]
    channel = tl.arange(0, HALF_PAD)[None, None, :]
    mask = there[:, None, None] & (head < heads) & (channel < HALF)
    at = base + row.to(tl.int64)[:, None, None] * row_stride + head * head_stride + channel
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if tl.max(pos, axis=0) > 0:
        angle = cos_sin_cache + pos.to(tl.int64)[:, None, None] * (2 * HALF) + channel + head * 0
        cos = tl.load(angle, mask=mask, other=1.0)
        sin = tl.load(angle + HALF, mask=mask, other=0.0)
        before = first
        first = before * cos - second * sin
        second = second * cos + before * sin
    to = out + out_row.to(tl.int64)[:, None, None] * out_stride + head * out_head_stride + channel
    tl.store(to, first.to(out.dtype.element_ty), mask=mask)
    tl.store(to + HALF, second.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _expand_keys(
    kv_rows, kv_row_index, rope_pos, key_start, cos_sin_cache, out_key, out_value,
    width, kv_heads, kv_row_stride, kv_head_stride, out_stride, out_head_stride,
    TILE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    first = tl.load(key_start + request)
    keys = tl.load(key_start + request + 1) - first
    begin = tl.program_id(1) * TILE
    if begin >= keys:
        return
    number = begin + tl.arange(0, TILE)
    there = number < keys
    listed = request.to(tl.int64) * width + number
    row = tl.load(kv_row_index + listed, mask=there, other=0)
    pos = tl.load(rope_pos + listed, mask=there, other=0)
    to = first + number
    _rotated(kv_rows, row, pos, out_key, to, there, cos_sin_cache, kv_row_stride, kv_head_stride, out_stride,
             out_head_stride, kv_heads, HEADS, HALF, HALF_PAD)  # fmt: skip
    _rotated(kv_rows + 2 * HALF, row, pos * 0, out_value, to, there, cos_sin_cache, kv_row_stride,
             kv_head_stride, out_stride, out_head_stride, kv_heads, HEADS, HALF, HALF_PAD)  # fmt: skip


# How many requests there are is no reason to compile again.
@triton.jit(do_not_specialize=["requests"])
def _expand_queries(
    query, query_row, rope_pos, start, cos_sin_cache, out, requests, heads, query_stride, query_head_stride,
    out_stride, out_head_stride,
    TILE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = number < tl.load(start + requests)
    row = tl.load(query_row + number, mask=there, other=0)
    pos = tl.load(rope_pos + number, mask=there, other=0)
    _rotated(query, row, pos, out, number, there, cos_sin_cache, query_stride, query_head_stride, out_stride,
             out_head_stride, heads, HEADS, HALF, HALF_PAD)  # fmt: skip


def expand_keys(
    kv_rows: torch.Tensor,
    keys: KeyLists,
    requests: slice,
    key_start: torch.Tensor,
    longest: int,
    cos_sin_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Expand the keys and values of some requests.

    Args:
        kv_rows: [rows, kv_heads, 2 * head_size], key then value of every KV row.
        keys: the virtual keys of all requests.
        requests: those to expand.
        key_start: int32 [requests + 1], rows of ``key`` at which those of each of them begin.
        longest: most keys that one of them has.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        key: [keys, kv_heads, head_size]; written.
        value: [keys, kv_heads, head_size]; written.

    """
    _, kv_heads, size = key.shape
    index = keys.kv_row_index[requests]
    heads = min(_HEADS, triton.next_power_of_2(kv_heads))
    grid = (index.shape[0], triton.cdiv(longest, _TILE), triton.cdiv(kv_heads, heads))
    _expand_keys[grid](
        kv_rows, index, keys.rope_pos[requests], key_start, cos_sin_cache, key, value, index.stride(0),
        kv_heads, kv_rows.stride(0), kv_rows.stride(1), key.stride(0), key.stride(1),
        TILE=_TILE, HEADS=heads, HALF=size // 2, HALF_PAD=triton.next_power_of_2(size // 2),
    )  # fmt: skip


def expand_queries(
    query: torch.Tensor, queries: QueryLists, cos_sin_cache: torch.Tensor, out: torch.Tensor
) -> None:
    """Expand a step's queries.

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        queries: the step's virtual queries.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        out: [N, heads, head_size]; written where there is a query.

    """
    number, heads, size = out.shape
    block = min(_HEADS, triton.next_power_of_2(heads))
    _expand_queries[(triton.cdiv(number, _TILE), 1, triton.cdiv(heads, block))](
        query, queries.row, queries.rope_pos, queries.start, cos_sin_cache, out,
        queries.start.shape[0] - 1, heads, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        TILE=_TILE, HEADS=block, HALF=size // 2, HALF_PAD=triton.next_power_of_2(size // 2),
    )  # fmt: skip
