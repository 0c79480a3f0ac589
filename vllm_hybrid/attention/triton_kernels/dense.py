"""Causal attention of packed sequences, where no library serves it, as FlashAttention-2 (arXiv 2307.08691).

To compute: 4 * head_size operations per visible pair and head. To ask of the caches, per tile of queries and
head: the keys and values that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

# Has the arguments of causal_attention.
DenseAttention = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        int,
        int,
        float,
        torch.Tensor,
    ],
    None,
]

_QUERIES = 64
_KEYS = 32
_LOG2_E = math.log2(math.e)


# Which of a step's requests are first in a group is no reason to compile again.
@triton.jit(do_not_specialize_on_alignment=["query_start", "key_start"])
def _dense(
    query, key, value, query_start, key_start, out, scale, query_stride, query_head_stride, key_stride,
    key_head_stride, value_stride, value_head_stride, out_stride, out_head_stride,
    GROUP: tl.constexpr, SIZE: tl.constexpr, SIZE_PAD: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1)
    head = tl.program_id(2)
    first = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - first
    begin = tl.program_id(0) * QUERIES
    if begin >= queries:
        return
    first_key = tl.load(key_start + sequence)
    keys = tl.load(key_start + sequence + 1) - first_key
    asked = begin + tl.arange(0, QUERIES)
    real = asked < queries
    channel = tl.arange(0, SIZE_PAD)
    inside = (channel < SIZE)[None, :]
    at = query + (first + asked).to(tl.int64)[:, None] * query_stride + head * query_head_stride
    q = tl.load(at + channel[None, :], mask=real[:, None] & inside, other=0.0).to(DOT)
    key += first_key.to(tl.int64) * key_stride + head // GROUP * key_head_stride
    value += first_key.to(tl.int64) * value_stride + head // GROUP * value_head_stride
    # A sequence's queries are its last positions.
    seen = keys - queries + asked + 1
    m_i = tl.full([QUERIES], -1e30, tl.float32)
    l_i = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, SIZE_PAD], tl.float32)
    for key_begin in range(0, tl.minimum(keys, keys - queries + begin + QUERIES), KEYS):
        number = key_begin + tl.arange(0, KEYS)
        there = (number < keys)[:, None] & inside
        k = tl.load(key + number[:, None] * key_stride + channel[None, :], mask=there, other=0.0)
        v = tl.load(value + number[:, None] * value_stride + channel[None, :], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee") * scale
        score = tl.where(number[None, :] < seen[:, None], score, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(score, axis=1))
        alpha = tl.exp2(m_i - m_new)
        weight = tl.exp2(score - m_new[:, None])
        l_i = l_i * alpha + tl.sum(weight, axis=1)
        acc = acc * alpha[:, None] + tl.dot(weight.to(DOT), v.to(DOT), input_precision="ieee")
        m_i = m_new
    answer = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    to = out + (first + asked).to(tl.int64)[:, None] * out_stride + head * out_head_stride + channel[None, :]
    tl.store(to, answer.to(out.dtype.element_ty), mask=real[:, None] & inside)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start: torch.Tensor,
    key_start: torch.Tensor,
    longest_query: int,
    longest_key: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Causal attention of each sequence, whose queries stand at the positions of its last keys.

    Args:
        query: [queries, heads, head_size], sequence after sequence, channels contiguous.
        key: [keys, kv_heads, head_size], sequence after sequence, channels contiguous.
        value: [keys, kv_heads, head_size], likewise.
        query_start: int32 [sequences + 1], a sequence's stretch of queries.
        key_start: int32 [sequences + 1], a sequence's stretch of keys.
        longest_query: most queries of a sequence, at least.
        longest_key: most keys of a sequence, at least.
        scale: factor on the scores.
        out: [queries, heads, head_size], channels contiguous; written, with 0 where there are no keys.

    """
    heads, size = query.shape[1:]
    grid = (triton.cdiv(longest_query, _QUERIES), query_start.shape[0] - 1, heads)
    _dense[grid](
        query, key, value, query_start, key_start, out, scale * _LOG2_E, query.stride(0), query.stride(1),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), out.stride(0), out.stride(1),
        GROUP=heads // key.shape[1], SIZE=size, SIZE_PAD=max(16, triton.next_power_of_2(size)),
        QUERIES=_QUERIES, KEYS=_KEYS, DOT=dot_type(key.dtype),
    )  # fmt: skip


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The dtype tensor cores multiply in, for operands of a dtype."""
    if triton.knobs.runtime.interpret:
        # The interpreter takes a bf16 operand's bits for integers.
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
