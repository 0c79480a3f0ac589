"""Attention of one query per request over its virtual keys, cut into parts that run side by side.

To move per request, layer and key/value head: keys and values of every row once from memory (4 * head_size
bytes a row in bf16; a row's further positions find it in the cache of the multiprocessor), 8 bytes of list
per virtual key. To compute: 4 * head_size operations per virtual key and query head, and 3 * head_size to
rotate an image's key. At 640 positions, 145 rows, 32 heads of 128 channels that is 2.4 MB read and 10 MFLOP,
where the full model reads 10.5 MB.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.lists import KeyLists
from vllm_hybrid.attention.triton_kernels.tiles import gather_halves, product, rotate

_TILE = 32
_MOST_SPLITS = 16
# Multiprocessors to fill where the device does not say.
_PROCESSORS = 132


@triton.jit
def _decode(
    query, query_rows, kv_rows, kv_row_index, rope_pos, count, cos_sin_cache, part_m, part_l, part_acc,
    scale, query_stride, query_head_stride, kv_row_stride, kv_head_stride, width,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HALF: tl.constexpr, HALF_PAD: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    query_row = tl.load(query_rows + request)
    keys = tl.load(count + request)
    if query_row < 0 or keys <= 0:
        return
    keys_per_split = tl.cdiv(tl.cdiv(keys, TILE), SPLITS) * TILE
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, keys)
    member = tl.arange(0, GROUP_PAD)
    channel = tl.arange(0, HALF_PAD)
    heads = kv_head * GROUP + member
    asked = query + query_row.to(tl.int64) * query_stride + kv_head * GROUP * query_head_stride
    q1, q2 = gather_halves(asked, member, query_head_stride, member < GROUP, HALF, HALF_PAD)
    kv_base = kv_rows + kv_head.to(tl.int64) * kv_head_stride
    m_i = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    l_i = tl.zeros([GROUP_PAD], tl.float32)
    acc1 = tl.zeros([GROUP_PAD, HALF_PAD], tl.float32)
    acc2 = tl.zeros([GROUP_PAD, HALF_PAD], tl.float32)
    for at in range(begin, end, TILE):
        key = at + tl.arange(0, TILE)
        there = key < end
        listed = request.to(tl.int64) * width + key
        row = tl.load(kv_row_index + listed, mask=there, other=0)
        pos = tl.load(rope_pos + listed, mask=there, other=0)
        k1, k2 = gather_halves(kv_base, row, kv_row_stride, there, HALF, HALF_PAD)
        k1, k2 = rotate(k1, k2, pos, cos_sin_cache, there, HALF, HALF_PAD)
        v1, v2 = gather_halves(kv_base + 2 * HALF, row, kv_row_stride, there, HALF, HALF_PAD)
        if GROUP == 1:
            score = tl.sum(q1 * k1 + q2 * k2, axis=1)[None, :]
        else:
            score = product(q1, tl.trans(k1), DOT) + product(q2, tl.trans(k2), DOT)
        score = tl.where(there[None, :], score * scale, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(score, axis=1))
        alpha = tl.exp(m_i - m_new)
        weight = tl.exp(score - m_new[:, None])
        l_i = l_i * alpha + tl.sum(weight, axis=1)
        if GROUP == 1:
            column = tl.trans(weight)
            acc1 = acc1 * alpha[:, None] + tl.sum(column * v1, axis=0)[None, :]
            acc2 = acc2 * alpha[:, None] + tl.sum(column * v2, axis=0)[None, :]
        else:
            acc1 = acc1 * alpha[:, None] + product(weight, v1, DOT)
            acc2 = acc2 * alpha[:, None] + product(weight, v2, DOT)
        m_i = m_new
    part = (request.to(tl.int64) * tl.num_programs(1) * GROUP + heads) * SPLITS + split
    real = member < GROUP
    tl.store(part_m + part, m_i, mask=real)
    tl.store(part_l + part, l_i, mask=real)
    cell = part_acc + part[:, None] * (2 * HALF) + channel[None, :]
    whole = real[:, None] & (channel < HALF)[None, :]
    tl.store(cell, acc1, mask=whole)
    tl.store(cell + HALF, acc2, mask=whole)


@triton.jit
def _combine(
    query_rows, count, part_m, part_l, part_acc, out, out_stride, out_head_stride,
    SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    query_row = tl.load(query_rows + request)
    if query_row < 0:
        return
    channel = tl.arange(0, SIZE_PAD)
    split = tl.arange(0, SPLITS)
    part = (request.to(tl.int64) * tl.num_programs(1) + head) * SPLITS + split
    # A request without keys has no parts either.
    there = split < tl.where(tl.load(count + request) > 0, SPLITS, 0)
    m_i = tl.load(part_m + part, mask=there, other=float("-inf"))
    most = tl.maximum(tl.max(m_i, axis=0), -1e30)
    factor = tl.exp(m_i - most)
    l_i = tl.sum(factor * tl.load(part_l + part, mask=there, other=0.0), axis=0)
    cells = part_acc + part[:, None] * SIZE + channel[None, :]
    acc = tl.load(cells, mask=there[:, None] & (channel < SIZE)[None, :], other=0.0)
    answer = tl.sum(factor[:, None] * acc, axis=0) / tl.where(l_i > 0, l_i, 1.0)
    to = out + query_row.to(tl.int64) * out_stride + head * out_head_stride + channel
    tl.store(to, answer.to(out.dtype.element_ty), mask=channel < SIZE)


def decode(
    query: torch.Tensor,
    query_rows: torch.Tensor,
    kv_rows: torch.Tensor,
    keys: KeyLists,
    cos_sin_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend from one text query per request; see :class:`vllm_hybrid.attention.interface.AttentionOps`.

    Grids depend on shapes alone, and lengths are read on the device, so that a captured graph serves any
    lengths. The parts are joined in a fixed order: runs agree to the bit.

    Args:
        query: [R, heads, head_size], rotated to their positions.
        query_rows: int32 [requests], live row of each request's query, -1 for requests to leave out.
        kv_rows: [rows, kv_heads, 2 * head_size], key then value of every KV row.
        keys: the requests' virtual keys; where there are none the answer is 0.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        scale: factor on the scores.
        out: [R, heads, head_size]; the rows of ``query_rows`` are written.

    """
    requests, heads, size = query_rows.shape[0], query.shape[1], query.shape[2]
    kv_heads = kv_rows.shape[1]
    group = heads // kv_heads
    splits = split_count(requests * kv_heads, keys.kv_row_index.shape[1], _processors(query.device))
    part_m, part_l = torch.empty(2, requests, heads, splits, dtype=torch.float32, device=query.device)
    part_acc = torch.empty(requests, heads, splits, size, dtype=torch.float32, device=query.device)
    half_pad = max(16, triton.next_power_of_2(size // 2))
    _decode[(requests, kv_heads, splits)](
        query, query_rows, kv_rows, keys.kv_row_index, keys.rope_pos, keys.count, cos_sin_cache,
        part_m, part_l, part_acc, scale, query.stride(0), query.stride(1),
        kv_rows.stride(0), kv_rows.stride(1), keys.kv_row_index.stride(0),
        GROUP=group, GROUP_PAD=1 if group == 1 else max(16, triton.next_power_of_2(group)),
        HALF=size // 2, HALF_PAD=half_pad, TILE=_TILE, SPLITS=splits, DOT=dot_type(kv_rows.dtype),
    )  # fmt: skip
    _combine[(requests, heads)](
        query_rows, keys.count, part_m, part_l, part_acc, out, out.stride(0), out.stride(1),
        SIZE=size, SIZE_PAD=triton.next_power_of_2(size), SPLITS=splits,
    )  # fmt: skip


def split_count(programs: int, width: int, processors: int) -> int:
    """Parts each request's keys are cut into: a power of two that gives every multiprocessor two programs."""
    wanted = triton.next_power_of_2(triton.cdiv(2 * processors, max(programs, 1)))
    return max(1, min(wanted, _MOST_SPLITS, triton.next_power_of_2(triton.cdiv(width, _TILE))))


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The dtype tensor cores multiply in, for keys and values of a dtype."""
    if triton.knobs.runtime.interpret:
        # The interpreter takes a bf16 operand's bits for integers.
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
