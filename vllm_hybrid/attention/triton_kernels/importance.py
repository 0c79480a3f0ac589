"""FastV's importance: what ranking queries give to the live rows that they rank (FastV, section 3.2).

Two passes over the keys, each as a decode step's first half: log-sum-exp per query and head, then the
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
def _keys_seen(count, start, ranking, asking):
    """Request of a ranking query, and how many of its keys the query sees; none without keys."""
    request = tl.load(ranking + asking * 3)
    # The queries stand at the positions of the last keys, and in the lower tier are the virtual rows.
    behind = tl.load(start + request + 1) - 1 - tl.load(ranking + asking * 3 + 1)
    return request, tl.load(count + request) - behind


@triton.jit
def _ranking_query(query, query_row, query_rope_pos, ranking, asking, head, query_stride, query_head_stride,
                   cos_sin_cache, HALF: tl.constexpr, HALF_PAD: tl.constexpr):  # fmt: skip
    """Halves [1, HALF_PAD] of a ranking query, rotated."""
    at = tl.load(ranking + asking * 3 + 1) + tl.arange(0, 1)
    there = at >= 0
    row = tl.load(query_row + at)
    pos = tl.load(query_rope_pos + at)
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
    query, kv_rows, kv_row_index, rope_pos, count, query_row, query_rope_pos, start, ranking, cos_sin_cache,
    out, scale, query_stride, query_head_stride, kv_row_stride, kv_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    asking = tl.program_id(0)
    head = tl.program_id(1)
    request, keys = _keys_seen(count, start, ranking, asking)
    q1, q2 = _ranking_query(query, query_row, query_rope_pos, ranking, asking, head, query_stride,
                            query_head_stride, cos_sin_cache, HALF, HALF_PAD)  # fmt: skip
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
    tl.store(out + asking * tl.num_programs(1) + head, m_i + tl.log(tl.where(l_i > 0, l_i, 1.0)))


@triton.jit
def _probabilities(
    query, kv_rows, kv_row_index, rope_pos, count, query_row, query_rope_pos, start, ranking, cos_sin_cache,
    log_sum, out, heads, scale, query_stride, query_head_stride, kv_row_stride, kv_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    asking = tl.program_id(0)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    request, keys = _keys_seen(count, start, ranking, asking)
    if tl.program_id(1) * TILE >= keys:
        return
    total = tl.zeros([TILE], tl.float32)
    for head in range(0, heads):
        q1, q2 = _ranking_query(query, query_row, query_rope_pos, ranking, asking, head, query_stride,
                                query_head_stride, cos_sin_cache, HALF, HALF_PAD)  # fmt: skip
        score = _scores(q1, q2, kv_rows, kv_row_index, rope_pos, cos_sin_cache, request, head, key,
                        key < keys, scale, kv_row_stride, kv_head_stride, width,
                        GROUP, HALF, HALF_PAD)  # fmt: skip
        total += tl.exp(score - tl.load(log_sum + asking * heads + head))
    tl.store(out + asking.to(tl.int64) * width + key, total, mask=key < keys)


def importance(
    query: torch.Tensor,
    kv_rows: torch.Tensor,
    keys: KeyLists,
    queries: QueryLists,
    ranking: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention each live row of the step receives; see
    :meth:`vllm_hybrid.attention.interface.AttentionOps.importance`.

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        kv_rows: [rows, kv_heads, 2 * head_size], key then value of every KV row.
        keys: the requests' virtual keys, one for every position.
        queries: the step's virtual queries, one for every virtual row.
        ranking: int32 [ranking queries, 3], request, virtual row and first row of each
            :class:`vllm_hybrid.attention.interface.RankingQuery`.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        scale: factor on the scores.

    Returns:
        float32 [R], summed over heads and positions; zero for rows outside of the queries' stretches.

    """
    heads, size = query.shape[1:]
    asking, width = ranking.shape[0], keys.kv_row_index.shape[1]
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
        ranking,
        cos_sin_cache,
    )
    log_sum = torch.empty(asking, heads, dtype=torch.float32, device=query.device)
    _log_sum[(asking, heads)](query, kv_rows, *lists, log_sum, scale, *common, **constants)
    probabilities = torch.zeros(asking, width, dtype=torch.float32, device=query.device)
    _probabilities[(asking, triton.cdiv(width, _TILE))](
        query, kv_rows, *lists, log_sum, probabilities, heads, scale, *common, **constants
    )
    given = _by_virtual_row(probabilities, keys, queries, ranking)
    return segment_sum(given, queries.by_row, queries.row_start)


def _by_virtual_row(
    probabilities: torch.Tensor, keys: KeyLists, queries: QueryLists, ranking: torch.Tensor
) -> torch.Tensor:
    """What the keys at the positions of the virtual rows are given by the queries that rank them.

    Args:
        probabilities: float32 [ranking queries, width], what each gives to the keys that it sees.
        keys: the requests' virtual keys.
        queries: the step's virtual queries.
        ranking: as for :func:`importance`.

    Returns:
        float32 [N]; zero for virtual rows in no query's stretch.

    """
    number = torch.arange(queries.row.shape[0], dtype=torch.int32, device=probabilities.device)
    request, row, first_row = ranking.T.contiguous()
    asking = torch.searchsorted(row, number).clamp(max=ranking.shape[0] - 1)
    ranked = (first_row[asking] <= number) & (number <= row[asking])
    its_request = request[asking]
    # A request's queries stand at the positions of its last keys.
    key = keys.count[its_request] - (queries.start[its_request + 1] - number)
    given = probabilities[asking, key.clamp(0, probabilities.shape[1] - 1)]
    return torch.where(ranked, given, 0)
