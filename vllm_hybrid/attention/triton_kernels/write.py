"""A step's keys and values into their KV rows: read once, written once.

FP8 pages hold E4M3 (Micikevicius et al., arXiv 2209.05433, table 1): 4 bits of exponent with bias 7, 3 of
mantissa. A half-precision float has the same form with 5 and 10 bits and bias 15, so that 2^-8 of a number,
as one, has the bits of its code in front; what is behind is rounded off, ties to even.
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
    x = tl.minimum(tl.maximum(x.to(tl.float32), -_MOST), _MOST)
    bits = (x * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    size = bits & 0x7FFF
    rounded = (size + 0x3F + ((size >> 7) & 1)) >> 7
    return (rounded | ((bits >> 8) & 0x80)).to(tl.uint8)


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
