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
from vllm_hybrid.attention.triton_kernels.tiles import gather_halves, turned

_TILE = 32


@triton.jit
def _last_query(query, query_row, query_turn, start, request, head, query_stride, query_head_stride, angles,
                HALF: tl.constexpr, HALF_PAD: tl.constexpr):  # fmt: skip
    """Halves [1, HALF_PAD] of a request's last query, turned."""
    last = tl.load(start + request + 1) - 1 + tl.arange(0, 1)
    there = last >= 0
    row = tl.load(query_row + last)
    turns = tl.load(query_turn + last)
    q1, q2 = gather_halves(query + head * query_head_stride, row, query_stride, there, HALF, HALF_PAD)
    return turned(q1, q2, turns, angles, there, HALF, HALF_PAD)


@triton.jit
def _scores(
    q1, q2, pages, rows, turn, angles, request, head, key, there, scale, page_stride, page_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
):  # fmt: skip
    """float32 [TILE]: a query's scaled scores of some virtual keys, -inf where there is none."""
    listed = request.to(tl.int64) * width + key
    row = tl.load(rows + listed, mask=there, other=0)
    turns = tl.load(turn + listed, mask=there, other=0)
    page = pages + (head // GROUP) * page_head_stride
    k1, k2 = gather_halves(page, row, page_stride, there, HALF, HALF_PAD)
    k1, k2 = turned(k1, k2, turns, angles, there, HALF, HALF_PAD)
    return tl.where(there, tl.sum(q1 * k1 + q2 * k2, axis=1) * scale, float("-inf"))


@triton.jit
def _log_sum(
    query, pages, rows, turn, count, query_row, query_turn, start, ranked, angles, out,
    scale, query_stride, query_head_stride, page_stride, page_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(ranked + request) == 0:
        return
    q1, q2 = _last_query(query, query_row, query_turn, start, request, head, query_stride,
                         query_head_stride, angles, HALF, HALF_PAD)  # fmt: skip
    keys = tl.load(count + request)
    top = -1e30
    total = 0.0
    for at in range(0, keys, TILE):
        key = at + tl.arange(0, TILE)
        score = _scores(q1, q2, pages, rows, turn, angles, request, head, key, key < keys, scale,
                        page_stride, page_head_stride, width, GROUP, HALF, HALF_PAD)  # fmt: skip
        new_top = tl.maximum(top, tl.max(score, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(score - new_top), axis=0)
        top = new_top
    tl.store(out + request * tl.num_programs(1) + head, top + tl.log(tl.where(total > 0, total, 1.0)))


@triton.jit
def _shares(
    query, pages, rows, turn, count, query_row, query_turn, start, ranked, angles, log_sum, out,
    heads, scale, query_stride, query_head_stride, page_stride, page_head_stride, width,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    keys = tl.load(count + request)
    if tl.load(ranked + request) == 0 or tl.program_id(1) * TILE >= keys:
        return
    total = tl.zeros([TILE], tl.float32)
    for head in range(0, heads):
        q1, q2 = _last_query(query, query_row, query_turn, start, request, head, query_stride,
                             query_head_stride, angles, HALF, HALF_PAD)  # fmt: skip
        score = _scores(q1, q2, pages, rows, turn, angles, request, head, key, key < keys, scale,
                        page_stride, page_head_stride, width, GROUP, HALF, HALF_PAD)  # fmt: skip
        total += tl.exp(score - tl.load(log_sum + request * heads + head))
    tl.store(out + request.to(tl.int64) * width + key, total, mask=key < keys)


def attention_mass(
    query: torch.Tensor,
    pages: torch.Tensor,
    keys: KeyLists,
    queries: QueryLists,
    ranked: torch.Tensor,
    angles: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention each live row of the step receives;
    see :func:`vllm_hybrid.attention.reference.attention_mass`.

    Args:
        query: [R, heads, head_size], text rows turned, image rows not.
        pages: [rows, kv_heads, 2 * head_size], key then value of every page row.
        keys: the requests' virtual keys.
        queries: the step's virtual queries.
        ranked: int32 [requests], 1 for the requests whose last query ranks.
        angles: float32 [positions, head_size], cosines then sines.
        scale: factor on the scores.

    Returns:
        float32 [R], summed over heads and positions; zero for rows of other requests.

    """
    heads, size = query.shape[1:]
    requests, width = keys.rows.shape
    common = (query.stride(0), query.stride(1), pages.stride(0), pages.stride(1), width)
    constants = {
        "GROUP": heads // pages.shape[1],
        "HALF": size // 2,
        "HALF_PAD": triton.next_power_of_2(size // 2),
        "TILE": _TILE,
    }
    lists = (keys.rows, keys.turn, keys.count, queries.row, queries.turn, queries.start, ranked, angles)
    log_sum = torch.empty(requests, heads, dtype=torch.float32, device=query.device)
    _log_sum[(requests, heads)](query, pages, *lists, log_sum, scale, *common, **constants)
    shares = torch.zeros(requests, width, dtype=torch.float32, device=query.device)
    _shares[(requests, triton.cdiv(width, _TILE))](
        query, pages, *lists, log_sum, shares, heads, scale, *common, **constants
    )
    return segment_sum(_by_query(shares, keys, queries), queries.by_row, queries.row_start)


def _by_query(shares: torch.Tensor, keys: KeyLists, queries: QueryLists) -> torch.Tensor:
    """float32 [N]: the share of the key that stands where each virtual query stands."""
    number = torch.arange(queries.row.shape[0], dtype=torch.int32, device=shares.device)
    requests = shares.shape[0]
    request = torch.searchsorted(queries.start, number, right=True).clamp(max=requests) - 1
    # A request's queries stand at the positions of its last keys.
    key = keys.count[request] - (queries.start[request + 1] - number)
    return shares[request, key.clamp(0, shares.shape[1] - 1)]
