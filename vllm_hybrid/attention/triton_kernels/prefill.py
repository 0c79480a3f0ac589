"""Causal attention of a step's virtual queries over virtual keys.

Keys are gathered by KV row and rotated on the way in, queries likewise; nothing is expanded in memory but
the answers, one per virtual query, which :mod:`.segments` averages. To compute: what the full model's
attention computes over the same positions (4 * head_size operations per visible pair and head), and
6 * head_size per key and tile of queries to rotate it. To move per request, layer and head: keys and values
of every row once from memory (again from the cache for each further tile of queries), one query and one
answer per virtual query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.decode import dot_type
from vllm_hybrid.attention.triton_kernels.lists import KeyLists, QueryLists
from vllm_hybrid.attention.triton_kernels.tiles import gather_halves, product, rotate

_QUERIES = 64
_KEYS = 32


@triton.jit
def find_request(start, tile, requests, QUERIES: tl.constexpr):
    """The request whose queries a tile holds; request r's tiles begin at start[r] // QUERIES + r."""
    low = tile * 0
    high = low + requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(start + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _prefill(
    query, kv_rows, kv_row_index, rope_pos, count, query_row, query_rope_pos, start, skip, cos_sin_cache, out,
    scale, requests, query_stride, query_head_stride, kv_row_stride, kv_head_stride, out_stride,
    out_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    request = find_request(start, tile, requests, QUERIES)
    if tl.load(skip + request) >= 0:
        return
    first = tl.load(start + request)
    last = tl.load(start + request + 1)
    begin = first + (tile - (first // QUERIES + request)) * QUERIES
    keys = tl.load(count + request)
    if begin >= last or keys <= 0:
        return
    asked = begin + tl.arange(0, QUERIES)
    real = asked < last
    row = tl.load(query_row + asked, mask=real, other=0)
    pos = tl.load(query_rope_pos + asked, mask=real, other=0)
    q1, q2 = gather_halves(query + head * query_head_stride, row, query_stride, real, HALF, HALF_PAD)
    q1, q2 = rotate(q1, q2, pos, cos_sin_cache, real, HALF, HALF_PAD)
    kv_base = kv_rows + (head // GROUP) * kv_head_stride
    # The queries stand at the positions of the last keys.
    seen = keys - (last - asked) + 1
    end = tl.minimum(keys - (last - tl.minimum(begin + QUERIES, last)), keys)
    m_i = tl.full([QUERIES], float("-inf"), tl.float32)
    l_i = tl.zeros([QUERIES], tl.float32)
    acc1 = tl.zeros([QUERIES, HALF_PAD], tl.float32)
    acc2 = tl.zeros([QUERIES, HALF_PAD], tl.float32)
    for at in range(0, end, KEYS):
        key = at + tl.arange(0, KEYS)
        there = key < end
        listed = request.to(tl.int64) * width + key
        its_row = tl.load(kv_row_index + listed, mask=there, other=0)
        its_pos = tl.load(rope_pos + listed, mask=there, other=0)
        k1, k2 = gather_halves(kv_base, its_row, kv_row_stride, there, HALF, HALF_PAD)
        k1, k2 = rotate(k1, k2, its_pos, cos_sin_cache, there, HALF, HALF_PAD)
        v1, v2 = gather_halves(kv_base + 2 * HALF, its_row, kv_row_stride, there, HALF, HALF_PAD)
        score = product(q1, tl.trans(k1), DOT) + product(q2, tl.trans(k2), DOT)
        visible = (key[None, :] < seen[:, None]) & there[None, :]
        score = tl.where(visible, score * scale, float("-inf"))
        m_new = tl.maximum(tl.maximum(m_i, tl.max(score, axis=1)), -1e30)
        alpha = tl.exp(m_i - m_new)
        weight = tl.exp(score - m_new[:, None])
        l_i = l_i * alpha + tl.sum(weight, axis=1)
        acc1 = acc1 * alpha[:, None] + product(weight, v1, DOT)
        acc2 = acc2 * alpha[:, None] + product(weight, v2, DOT)
        m_i = m_new
    over = 1.0 / tl.where(l_i > 0, l_i, 1.0)
    channel = tl.arange(0, HALF_PAD)
    cell = out + asked.to(tl.int64)[:, None] * out_stride + head * out_head_stride + channel[None, :]
    whole = real[:, None] & (channel < HALF)[None, :]
    tl.store(cell, (acc1 * over[:, None]).to(out.dtype.element_ty), mask=whole)
    tl.store(cell + HALF, (acc2 * over[:, None]).to(out.dtype.element_ty), mask=whole)


def prefill(
    query: torch.Tensor,
    kv_rows: torch.Tensor,
    keys: KeyLists,
    queries: QueryLists,
    skip: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    scale: float,
    copies: torch.Tensor,
) -> None:
    """Attend from every virtual query of a step; see :class:`vllm_hybrid.attention.interface.AttentionOps`.

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        kv_rows: [rows, kv_heads, 2 * head_size], key then value of every KV row.
        keys: the requests' virtual keys.
        queries: the step's virtual queries.
        skip: int32 [requests], not negative for requests that are left out: decodes.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        scale: factor on the scores.
        copies: [N, heads, head_size], the answer of each virtual query; written where there is one.

    """
    heads, size = query.shape[1:]
    requests = skip.shape[0]
    tiles = triton.cdiv(queries.row.shape[0], _QUERIES) + requests
    _prefill[(tiles, heads)](
        query, kv_rows, keys.kv_row_index, keys.rope_pos, keys.count, queries.row, queries.rope_pos,
        queries.start, skip, cos_sin_cache, copies, scale, requests, query.stride(0), query.stride(1),
        kv_rows.stride(0), kv_rows.stride(1), copies.stride(0), copies.stride(1), keys.kv_row_index.stride(0),
        GROUP=heads // kv_rows.shape[1], HALF=size // 2, HALF_PAD=max(16, triton.next_power_of_2(size // 2)),
        QUERIES=_QUERIES, KEYS=_KEYS, DOT=dot_type(kv_rows.dtype),
    )  # fmt: skip
