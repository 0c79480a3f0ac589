"""Attention of one query per request over its stored rows, cut into parts that run side by side.

The score of a rotated query q and an unrotated key k at position j is
sum_c cos(j t_c) (q1 k1 + q2 k2) + sin(j t_c) (q2 k1 - q1 k2) over the halves of the channels (RoPE in
half-split style, RoFormer, arXiv 2104.09864, section 3.2.2). So a merged row is read once for all its
positions: two products, a dot product with cosines and sines for each position, and its value once with the
sum of the weights.

To move per request, layer and key/value head: keys and values of every row once from memory (4 * head_size
bytes a row in bf16), 4 bytes of list per text row, 8 per segment and 4 per position. Cosines and sines of a
position are made from two rows of the table (position = 32 hi + lo), so that what is asked for again and
again is few rows, which stay in the cache of a multiprocessor; the heads of a program ask for the same ones.
To compute: 4 * head_size operations per row and query head, 5 * head_size per position of an image row.

Each row of a tile keeps a softmax of its own, and they are joined at the end: nothing crosses warps on the
way but how many positions a tile's longest segment has.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.lists import RowLists

_TILE = 4
_HEADS = 4
_FINE = 32
_MOST_SPLITS = 32
# Beside prompts, which fill the device, any number of parts will do; one, so that one kernel is compiled.
_LISTED_SPLITS = 4
# Programs for each multiprocessor, as many as its registers hold.
_PROGRAMS = 4
# Multiprocessors to fill where the device does not say.
_PROCESSORS = 132
# Softmax is taken to base 2.
_LOG2_E = math.log2(math.e)
# Less than any score, and finite: a row that saw nothing weighs nothing.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _load(at, channel, there, HALF: tl.constexpr, MASKED: tl.constexpr):
    """What lies at some addresses [TILE, HEADS, HALF_PAD]; zero at channels and heads that are not there."""
    if MASKED:
        return tl.load(at, mask=there & (channel < HALF), other=0.0)
    return tl.load(at)


@triton.jit
def _halves(
    base, rows, row_stride, real, HALF: tl.constexpr, HALF_PAD: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Both halves, as stored, [TILE, HEADS, HALF_PAD], of what lies at base [1, HEADS, 1] in some rows."""
    channel = tl.arange(0, HALF_PAD)[None, None, :]
    at = base + rows.to(tl.int64)[:, None, None] * row_stride + channel
    there = real[None, :, None]
    first = _load(at, channel, there, HALF, MASKED)
    return first, _load(at + HALF, channel, there, HALF, MASKED)


@triton.jit
def _segments(segment_row, segment_start, number):
    """KV row, first member and members of some segments."""
    first = tl.load(segment_start + number)
    return tl.load(segment_row + number), first, tl.load(segment_start + number + 1) - first


@triton.jit
def _angles(
    pos, real, cos_sin_cache, FINE: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Cosines and sines, float32 [TILE, HEADS, HALF_PAD] each, of some positions, by the sum of two angles.

    Each head asks for its own, all for the same addresses: so they lie in registers as keys do.
    """
    channel = tl.arange(0, HALF_PAD)[None, None, :]
    there = real[None, :, None]
    everywhere = channel + there.to(tl.int32) * 0
    coarse = cos_sin_cache + (pos // FINE * FINE)[:, None, None] * (2 * HALF) + everywhere
    fine = cos_sin_cache + (pos % FINE)[:, None, None] * (2 * HALF) + everywhere
    cos1 = _load(coarse, channel, there, HALF, MASKED)
    sin1 = _load(coarse + HALF, channel, there, HALF, MASKED)
    cos0 = _load(fine, channel, there, HALF, MASKED)
    sin0 = _load(fine + HALF, channel, there, HALF, MASKED)
    return cos1 * cos0 - sin1 * sin0, sin1 * cos0 + cos1 * sin0


@triton.jit
def _add_rows(m_i, l_i, acc1, acc2, m_row, l_row, v1, v2):
    """The rows' softmaxes [TILE, HEADS] with one more row each, of scores' maximum m and weight l at it."""
    m_new = tl.maximum(m_i, m_row)
    alpha = tl.exp2(m_i - m_new)
    weight = l_row * tl.exp2(m_row - m_new)
    acc1 = acc1 * alpha[:, :, None] + weight[:, :, None] * v1.to(tl.float32)
    acc2 = acc2 * alpha[:, :, None] + weight[:, :, None] * v2.to(tl.float32)
    return m_new, l_i * alpha + weight, acc1, acc2


@triton.jit
def _part(count, split, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """First and one past the last entry of a part of a list, whole tiles each."""
    per_split = tl.cdiv(tl.cdiv(count, TILE), SPLITS) * TILE
    begin = split * per_split
    return begin, tl.minimum(begin + per_split, count)


@triton.jit
def _decode(
    query, query_rows, kv_rows, text_row, text_count, segment_row, segment_start, segment_count, position,
    cos_sin_cache, part_m, part_l, part_acc, out, scale, query_stride, query_head_stride, kv_row_stride,
    kv_head_stride, out_stride, out_head_stride, width, heads,
    LISTED: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    HALF_PAD: tl.constexpr, TILE: tl.constexpr, FINE: tl.constexpr, SPLITS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    split = tl.program_id(2)
    query_row = request
    if LISTED:
        query_row = tl.load(query_rows + request)
        if query_row < 0:
            return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = head < heads
    channel = tl.arange(0, HALF_PAD)
    whole = real[:, None] & (channel < HALF)[None, :]
    asked = query + query_row.to(tl.int64) * query_stride
    asked += head[:, None] * query_head_stride + channel[None, :]
    q1 = (tl.load(asked, mask=whole, other=0.0).to(tl.float32) * scale)[None, :, :]
    q2 = (tl.load(asked + HALF, mask=whole, other=0.0).to(tl.float32) * scale)[None, :, :]
    key = kv_rows + ((head // GROUP).to(tl.int64) * kv_head_stride)[None, :, None]
    own_lists = request.to(tl.int64) * width
    text_row += own_lists
    segment_row += own_lists
    segment_start += own_lists + request
    position += own_lists
    m_i = tl.full([TILE, HEADS], _LOWEST, tl.float32)
    l_i = tl.zeros([TILE, HEADS], tl.float32)
    acc1 = tl.zeros([TILE, HEADS, HALF_PAD], tl.float32)
    acc2 = tl.zeros([TILE, HEADS, HALF_PAD], tl.float32)
    # Entries past a part's end stand for its last one and weigh nothing, so that no load needs a mask.
    within = tl.arange(0, TILE)
    begin, end = _part(tl.load(text_count + request), split, TILE, SPLITS)
    if begin < end:
        row = tl.load(text_row + tl.minimum(begin + within, end - 1))
        next_k1, next_k2 = _halves(key, row, kv_row_stride, real, HALF, HALF_PAD, MASKED)
        next_v1, next_v2 = _halves(key + 2 * HALF, row, kv_row_stride, real, HALF, HALF_PAD, MASKED)
        next_row = tl.load(text_row + tl.minimum(begin + TILE + within, end - 1))
        for at in range(begin, end, TILE):
            k1, k2, v1, v2 = next_k1, next_k2, next_v1, next_v2
            # What comes next is asked for before this tile is worked on, its rows a tile earlier still.
            next_k1, next_k2 = _halves(key, next_row, kv_row_stride, real, HALF, HALF_PAD, MASKED)
            next_v1, next_v2 = _halves(key + 2 * HALF, next_row, kv_row_stride, real, HALF, HALF_PAD, MASKED)
            next_row = tl.load(text_row + tl.minimum(at + 2 * TILE + within, end - 1))
            inside = (at + within < end)[:, None]
            score = tl.sum(q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32), axis=2)
            score = tl.where(inside, score, _LOWEST)
            seen = tl.where(inside, 1.0, 0.0) + tl.zeros_like(score)
            m_i, l_i, acc1, acc2 = _add_rows(m_i, l_i, acc1, acc2, score, seen, v1, v2)
    begin, end = _part(tl.load(segment_count + request), split, TILE, SPLITS)
    if begin < end:
        number = tl.minimum(begin + within, end - 1)
        next_row, next_first, next_held = _segments(segment_row, segment_start, number)
        for at in range(begin, end, TILE):
            row, first = next_row, next_first
            held = tl.where(at + within < end, next_held, 0)
            k1, k2 = _halves(key, row, kv_row_stride, real, HALF, HALF_PAD, MASKED)
            v1, v2 = _halves(key + 2 * HALF, row, kv_row_stride, real, HALF, HALF_PAD, MASKED)
            number = tl.minimum(at + TILE + within, end - 1)
            next_row, next_first, next_held = _segments(segment_row, segment_start, number)
            along = q1 * k1.to(tl.float32) + q2 * k2.to(tl.float32)
            across = q2 * k1.to(tl.float32) - q1 * k2.to(tl.float32)
            m_row = tl.full([TILE, HEADS], _LOWEST, tl.float32)
            l_row = tl.zeros([TILE, HEADS], tl.float32)
            for member in range(0, tl.max(held, axis=0)):
                here = (member < held)[:, None]
                pos = tl.load(position + first + tl.maximum(tl.minimum(member, held - 1), 0))
                cos, sin = _angles(pos, real, cos_sin_cache, FINE, HALF, HALF_PAD, MASKED)
                score = tl.where(here, tl.sum(along * cos + across * sin, axis=2), _LOWEST)
                m_new = tl.maximum(m_row, score)
                weight = tl.where(here, tl.exp2(score - m_new), 0.0)
                l_row = l_row * tl.exp2(m_row - m_new) + weight
                m_row = m_new
            m_i, l_i, acc1, acc2 = _add_rows(m_i, l_i, acc1, acc2, m_row, l_row, v1, v2)
    m_all = tl.max(m_i, axis=0)
    factor = tl.exp2(m_i - m_all[None, :])
    l_all = tl.sum(l_i * factor, axis=0)
    acc1 = tl.sum(acc1 * factor[:, :, None], axis=0)
    acc2 = tl.sum(acc2 * factor[:, :, None], axis=0)
    if SPLITS == 1:
        over = (1.0 / tl.where(l_all > 0, l_all, 1.0))[:, None]
        cell = out + query_row.to(tl.int64) * out_stride + head[:, None] * out_head_stride + channel[None, :]
        tl.store(cell, (acc1 * over).to(out.dtype.element_ty), mask=whole)
        tl.store(cell + HALF, (acc2 * over).to(out.dtype.element_ty), mask=whole)
    else:
        part = (request.to(tl.int64) * heads + head) * SPLITS + split
        tl.store(part_m + part, m_all, mask=real)
        tl.store(part_l + part, l_all, mask=real)
        cell = part_acc + part[:, None] * (2 * HALF) + channel[None, :]
        tl.store(cell, acc1, mask=whole)
        tl.store(cell + HALF, acc2, mask=whole)


@triton.jit
def _combine(
    query_rows, part_m, part_l, part_acc, out, out_stride, out_head_stride,
    LISTED: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    query_row = request
    if LISTED:
        query_row = tl.load(query_rows + request)
        if query_row < 0:
            return
    channel = tl.arange(0, SIZE_PAD)
    split = tl.arange(0, SPLITS)
    part = (request.to(tl.int64) * tl.num_programs(1) + head) * SPLITS + split
    m_i = tl.load(part_m + part)
    factor = tl.exp2(m_i - tl.max(m_i, axis=0))
    l_i = tl.sum(factor * tl.load(part_l + part), axis=0)
    cells = part_acc + part[:, None] * SIZE + channel[None, :]
    acc = tl.load(cells, mask=(channel < SIZE)[None, :], other=0.0)
    answer = tl.sum(factor[:, None] * acc, axis=0) / tl.where(l_i > 0, l_i, 1.0)
    to = out + query_row.to(tl.int64) * out_stride + head * out_head_stride + channel
    tl.store(to, answer.to(out.dtype.element_ty), mask=channel < SIZE)


def decode(
    query: torch.Tensor,
    query_rows: torch.Tensor | None,
    kv_rows: torch.Tensor,
    rows: RowLists,
    cos_sin_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend from one text query per request; see :class:`vllm_hybrid.attention.interface.AttentionOps`.

    Grids depend on shapes alone, and lengths are read on the device, so that a captured graph serves any
    lengths. The parts are joined in a fixed order: runs agree to the bit.

    Args:
        query: [R, heads, head_size], rotated to their positions.
        query_rows: int32 [requests], live row of each request's query, -1 for requests to leave out; None
            where request r's is row r.
        kv_rows: [rows, kv_heads, 2 * head_size], key then value of every KV row.
        rows: the requests' keys by stored row; where there are none the answer is 0.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        scale: factor on the scores.
        out: [R, heads, head_size]; the rows of the queries are written.

    """
    heads, size = query.shape[1:]
    requests = rows.text_count.shape[0]
    per_program = min(_HEADS, triton.next_power_of_2(heads))
    blocks = triton.cdiv(heads, per_program)
    splits = _LISTED_SPLITS
    if query_rows is None:
        splits = split_count(requests * blocks, rows.position.shape[1], _processors(query.device))
    parts = (requests, heads, splits) if splits > 1 else (0, heads, 1)
    # Each by itself: where it lies in another is no reason to compile again.
    part_m, part_l = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
    part_acc = torch.empty(*parts, size, dtype=torch.float32, device=query.device)
    half_pad = max(16, triton.next_power_of_2(size // 2))
    listed = query_rows is not None
    given_rows = rows.text_count if query_rows is None else query_rows
    _decode[(requests, blocks, splits)](
        query, given_rows, kv_rows, rows.text_row, rows.text_count, rows.segment_row, rows.segment_start,
        rows.segment_count, rows.position, cos_sin_cache, part_m, part_l, part_acc, out, scale * _LOG2_E,
        query.stride(0), query.stride(1), kv_rows.stride(0), kv_rows.stride(1), out.stride(0), out.stride(1),
        rows.text_row.stride(0), heads,
        LISTED=listed, GROUP=heads // kv_rows.shape[1], HEADS=per_program, HALF=size // 2,
        HALF_PAD=half_pad, TILE=_TILE, FINE=_FINE, SPLITS=splits,
        MASKED=half_pad != size // 2 or heads % per_program != 0,
    )  # fmt: skip
    if splits > 1:
        _combine[(requests, heads)](
            given_rows, part_m, part_l, part_acc, out, out.stride(0), out.stride(1),
            LISTED=listed, SIZE=size, SIZE_PAD=triton.next_power_of_2(size), SPLITS=splits,
        )  # fmt: skip


def split_count(programs: int, width: int, processors: int) -> int:
    """Parts each request's rows are cut into: a power of two that fills the multiprocessors once."""
    wanted = max(1, _PROGRAMS * processors // max(programs, 1))
    most = triton.next_power_of_2(triton.cdiv(width, 4 * _TILE))
    return min(1 << wanted.bit_length() - 1, _MOST_SPLITS, most)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
