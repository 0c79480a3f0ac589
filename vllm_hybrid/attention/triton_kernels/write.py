"""A step's keys and values into their KV rows: read once, written once.

FP8 pages hold E4M3 (Micikevicius et al., arXiv 2209.05433, table 1): 4 bits of exponent with bias 7, 3 of
mantissa, and below 2^-6 multiples of 2^-9. Numbers are rounded to the nearest, ties to even.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHANNELS = 1024


# The greatest number of E4M3.
_MOST = tl.constexpr(448.0)


@triton.jit
def _e4m3(x):
    """The codes, uint8, of the nearest numbers that E4M3 has; its largest for what is larger."""
    x = x.to(tl.float32)
    size = tl.minimum(tl.abs(x), _MOST)
    bits = size.to(tl.int32, bitcast=True)
    # A float's mantissa has 20 bits more; its exponent's bias is 120 more.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Beside 2^14 a float keeps multiples of 2^-9.
    small = (size + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, small, normal)
    return tl.where(x < 0, code | 0x80, code).to(tl.uint8)


@triton.jit
def _write(
    key, value, kv_rows, kv_row_index, key_stride, value_stride, kv_row_stride, channels,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    # A KV row is key and value of one head after the other.
    to = kv_rows + tl.load(kv_row_index + row) * kv_row_stride + channel // SIZE * (2 * SIZE) + channel % SIZE
    own_key = tl.load(key + row * key_stride + channel, mask=there, other=0.0)
    own_value = tl.load(value + row * value_stride + channel, mask=there, other=0.0)
    if FP8:
        tl.store(to, _e4m3(own_key), mask=there)
        tl.store(to + SIZE, _e4m3(own_value), mask=there)
    else:
        tl.store(to, own_key.to(kv_rows.dtype.element_ty), mask=there)
        tl.store(to + SIZE, own_value.to(kv_rows.dtype.element_ty), mask=there)


def write(key: torch.Tensor, value: torch.Tensor, kv_rows: torch.Tensor, kv_row_index: torch.Tensor) -> None:
    """Store keys and values; see :meth:`vllm_hybrid.attention.interface.AttentionOps.write_pages`.

    Args:
        key: [R, kv_heads, head_size], heads and channels contiguous.
        value: [R, kv_heads, head_size], heads and channels contiguous.
        kv_rows: [rows, kv_heads, 2 * head_size], heads and channels contiguous, of floats or, rounded to the
            nearest, float8_e4m3fn; written.
        kv_row_index: int64 [R], KV row of each.

    """
    rows, kv_heads, size = key.shape
    channels = kv_heads * size
    fp8 = kv_rows.dtype == torch.float8_e4m3fn
    pages = kv_rows.view(torch.uint8) if fp8 else kv_rows
    _write[(rows, triton.cdiv(channels, _CHANNELS))](
        key, value, pages, kv_row_index, key.stride(0), value.stride(0), kv_rows.stride(0), channels,
        SIZE=size, CHANNELS=min(_CHANNELS, triton.next_power_of_2(channels)), FP8=fp8,
    )  # fmt: skip
