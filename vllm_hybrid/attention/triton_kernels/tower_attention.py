"""Proportional attention of the vision tower, image by image (ToMe, arXiv 2210.09461, section 3.2).

To compute: 4 * head_size operations per pair of tokens of one image and head. To move: queries, keys, values
and answers once; keys and values come from the cache again for each further tile of queries.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.dense import dot_type
from vllm_hybrid.attention.triton_kernels.stretches import find_stretch, tile_count

_QUERIES = 64
_KEYS = 64


@triton.jit
def _load_rows(base, row, row_stride, there, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr):
    """[n, SIZE_PAD] of the rows ``base + row * row_stride``, zero elsewhere."""
    channel = tl.arange(0, SIZE_PAD)
    at = base + row.to(tl.int64)[:, None] * row_stride + channel[None, :]
    if SIZE == SIZE_PAD:
        return tl.load(at, mask=there[:, None], other=0.0)
    return tl.load(at, mask=there[:, None] & (channel < SIZE)[None, :], other=0.0)


# Neither the number of images nor where a layer's bounds begin is a reason to compile again.
@triton.jit(do_not_specialize=["stretches"], do_not_specialize_on_alignment=["starts"])
def _tower_attention(
    query, key, value, size, starts, out, scale, stretches,
    query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride,
    out_stride, out_head_stride,
    SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tl.program_id(1)
    stretch = find_stretch(starts, tile, stretches, QUERIES)
    first = tl.load(starts + stretch)
    end = tl.load(starts + stretch + 1)
    begin = first + (tile - (first // QUERIES + stretch)) * QUERIES
    if begin >= end:
        return
    row = begin + tl.arange(0, QUERIES)
    q = _load_rows(query + head * query_head_stride, row, query_stride, row < end, SIZE, SIZE_PAD).to(DOT)
    m_i = tl.full([QUERIES], float("-inf"), tl.float32)
    l_i = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, SIZE_PAD], tl.float32)
    # The last stretch is padding: it has no keys and is answered with 0.
    for at in range(first, tl.where(stretch < stretches - 1, end, first), KEYS):
        seen = at + tl.arange(0, KEYS)
        there = seen < end
        k = _load_rows(key + head * key_head_stride, seen, key_stride, there, SIZE, SIZE_PAD).to(DOT)
        v = _load_rows(value + head * value_head_stride, seen, value_stride, there, SIZE, SIZE_PAD).to(DOT)
        weighs = tl.log2(tl.load(size + seen, mask=there, other=1.0))
        # Logits are to the base 2, whose exponential the hardware has.
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + weighs[None, :]
        score = tl.where(there[None, :], score, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(score, axis=1))
        alpha = tl.exp2(m_i - m_new)
        weight = tl.exp2(score - m_new[:, None])
        l_i = l_i * alpha + tl.sum(weight, axis=1)
        acc = acc * alpha[:, None] + tl.dot(weight.to(DOT), v, input_precision="ieee")
        m_i = m_new
    acc = acc * (1.0 / tl.where(l_i > 0, l_i, 1.0))[:, None]
    channel = tl.arange(0, SIZE_PAD)
    cell = out + row.to(tl.int64)[:, None] * out_stride + head * out_head_stride + channel[None, :]
    tl.store(cell, acc.to(out.dtype.element_ty), mask=(row < end)[:, None] & (channel < SIZE)[None, :])


def tower_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    size: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention inside every image, log(size) added to the logits of each key in float32.

    Args:
        query: [rows, heads, head_size], channels contiguous; keys and values alike.
        key: see query.
        value: see query.
        size: float32 [rows], patches a token stands for.
        starts: int32 [images + 2], stretches of rows: of every image and of the padding.
        scale: factor on the logits.

    Returns:
        [rows, heads, head_size], zeros at padding.

    """
    rows, heads, head_size = query.shape
    stretches = starts.shape[0] - 1
    out = query.new_empty(rows, heads, head_size)
    _tower_attention[(heads, tile_count(rows, stretches, _QUERIES))](
        query, key, value, size, starts, out, scale * math.log2(math.e), stretches,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        out.stride(0), out.stride(1),
        SIZE=head_size, SIZE_PAD=max(16, triton.next_power_of_2(head_size)), QUERIES=_QUERIES, KEYS=_KEYS,
        DOT=dot_type(query.dtype),
    )  # fmt: skip
    return out
