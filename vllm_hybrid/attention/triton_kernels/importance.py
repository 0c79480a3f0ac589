"""FastV's importance: what the last query of a request gives to each of its live rows (FastV, section 3.2).

Two passes over the keys, each as a decode step's first half: log-sum-exp per request and head, then the
probabilities, summed over the heads in order. Then a sum over each live row's positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.lists import KeyLists, QueryLists
from vllm_hybrid.attention.triton_kernels.segments import segment_sum
from vllm_hybrid.attention.triton_kernels.tiles import gather_halves, rotate

_TILE = 32


@triton.jit
def _last_query(query, query_row, query_rope_pos, start, request, head, query_stride, query_head_stride,
                cos_sin_cache, HALF: tl.constexpr, HALF_PAD: tl.constexpr):  # fmt: skip
    """Halves [1, HALF_PAD] of a request's last query, rotated."""
    last = tl.load(start + request + 1) - 1 + tl.arange(0, 1)
    there = last >= 0
    row = tl.load(query_row + last)
    pos = tl.load(query_rope_pos + last)
    q1, q2 = gather_halves(query + head * query_head_stride, row, query_stride, there, HALF, HALF_PAD)
    return rotate(q1, q2, pos, cos_sin_cache, there, HALF, HALF_PAD)


@triton.jit
def _scores(
    q1, q2, kv_rows, kv_row_index, rope_pos, cos_sin_cache, request, head, key, there, scale,
    kv_row_stride, kv_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """float32 [TILE]: a query's scaled scores of some virtual keys, -inf where there is none."""
    listed = request.to(tl.int64) * width + key
    row = tl.load(kv_row_index + listed, mask=there, other=0)
    pos = tl.load(rope_pos + listed, mask=there, other=0)
    kv_base = kv_rows + (head // GROUP) * kv_head_stride
    k1, k2 = gather_halves(kv_base, row, kv_row_stride, there, HALF, HALF_PAD)
    k1, k2 = rotate(k1, k2, pos, cos_sin_cache, there, HALF, HALF_PAD)
    return tl.where(there, tl.sum(q1 * k1 + q2 * k2, axis=1) * scale, float("-inf"))


@triton.jit
def _log_sum(
    query, kv_rows, kv_row_index, rope_pos, count, query_row, query_rope_pos, start, scored, cos_sin_cache,
    out, scale, query_stride, query_head_stride, kv_row_stride, kv_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(scored + request) == 0:
        return
    q1, q2 = _last_query(query, query_row, query_rope_pos, start, request, head, query_stride,
                         query_head_stride, cos_sin_cache, HALF, HALF_PAD)  # fmt: skip
    keys = tl.load(count + request)
    m_i = -1e30
    l_i = 0.0
    for at in range(0, keys, TILE):
        key = at + tl.arange(0, TILE)
        score = _scores(q1, q2, kv_rows, kv_row_index, rope_pos, cos_sin_cache, request, head, key,
                        key < keys, scale, kv_row_stride, kv_head_stride, width,
                        GROUP, HALF, HALF_PAD)  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(score, axis=0))
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(score - m_new), axis=0)
        m_i = m_new
    tl.store(out + request * tl.num_programs(1) + head, m_i + tl.log(tl.where(l_i > 0, l_i, 1.0)))


@triton.jit
def _probabilities(
    query, kv_rows, kv_row_index, rope_pos, count, query_row, query_rope_pos, start, scored, cos_sin_cache,
    log_sum, out, heads, scale, query_stride, query_head_stride, kv_row_stride, kv_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = tl.load(count + request)
    if tl.load(scored + request) == 0 or tl.program_id(1) * TILE >= keys:
        return
    total = tl.zeros([TILE], tl.float32)
    for head in range(0, heads):
        q1, q2 = _last_query(query, query_row, query_rope_pos, start, request, head, query_stride,
                             query_head_stride, cos_sin_cache, HALF, HALF_PAD)  # fmt: skip
        score = _scores(q1, q2, kv_rows, kv_row_index, rope_pos, cos_sin_cache, request, head, key,
                        key < keys, scale, kv_row_stride, kv_head_stride, width,
                        GROUP, HALF, HALF_PAD)  # fmt: skip
        total += tl.exp(score - tl.load(log_sum + request * heads + head))
    tl.store(out + request.to(tl.int64) * width + key, total, mask=key < keys)


def importance(
    query: torch.Tensor,
    kv_rows: torch.Tensor,
    keys: KeyLists,
    queries: QueryLists,
    scored: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention each live row of the step receives; see
    :meth:`vllm_hybrid.attention.interface.AttentionOps.importance`.

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        kv_rows: [rows, kv_heads, 2 * head_size], key then value of every KV row.
        keys: the requests' virtual keys.
        queries: the step's virtual queries.
        scored: int32 [requests], 1 for the requests whose last query scores.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        scale: factor on the scores.

    Returns:
        float32 [R], summed over heads and positions; zero for rows of other requests.

    """
    heads, size = query.shape[1:]
    requests, width = keys.kv_row_index.shape
    common = (query.stride(0), query.stride(1), kv_rows.stride(0), kv_rows.stride(1), width)
    constants = {
        "GROUP": heads // kv_rows.shape[1],
        "HALF": size // 2,
        "HALF_PAD": triton.next_power_of_2(size // 2),
        "TILE": _TILE,
    }
    lists = (
        keys.kv_row_index,
        keys.rope_pos,
        keys.count,
        queries.row,
        queries.rope_pos,
        queries.start,
        scored,
        cos_sin_cache,
    )
    log_sum = torch.empty(requests, heads, dtype=torch.float32, device=query.device)
    _log_sum[(requests, heads)](query, kv_rows, *lists, log_sum, scale, *common, **constants)
    probabilities = torch.zeros(requests, width, dtype=torch.float32, device=query.device)
    _probabilities[(requests, triton.cdiv(width, _TILE))](
        query, kv_rows, *lists, log_sum, probabilities, heads, scale, *common, **constants
    )
    return segment_sum(_by_query(probabilities, keys, queries), queries.by_row, queries.row_start)


def _by_query(probabilities: torch.Tensor, keys: KeyLists, queries: QueryLists) -> torch.Tensor:
    """float32 [N]: the probability of the key that stands where each virtual query stands."""
    number = torch.arange(queries.row.shape[0], dtype=torch.int32, device=probabilities.device)
    requests = probabilities.shape[0]
    request = torch.searchsorted(queries.start, number, right=True).clamp(max=requests) - 1
    # A request's queries stand at the positions of its last keys.
    key = keys.count[request] - (queries.start[request + 1] - number)
    return probabilities[request, key.clamp(0, probabilities.shape[1] - 1)]
