"""A step's keys and values into their KV rows: read once, written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHANNELS = 1024


@triton.jit
def _write(
    key, value, kv_rows, kv_row_index, key_stride, value_stride, kv_row_stride, channels,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    # A KV row is key and value of one head after the other.
    to = kv_rows + tl.load(kv_row_index + row) * kv_row_stride + channel // SIZE * (2 * SIZE) + channel % SIZE
    stored = kv_rows.dtype.element_ty
    tl.store(to, tl.load(key + row * key_stride + channel, mask=there).to(stored), mask=there)
    tl.store(to + SIZE, tl.load(value + row * value_stride + channel, mask=there).to(stored), mask=there)


def write(key: torch.Tensor, value: torch.Tensor, kv_rows: torch.Tensor, kv_row_index: torch.Tensor) -> None:
    """Store keys and values; see :meth:`vllm_hybrid.attention.interface.AttentionOps.write_pages`.

    Args:
        key: [R, kv_heads, head_size], heads and channels contiguous.
        value: [R, kv_heads, head_size], heads and channels contiguous.
        kv_rows: [rows, kv_heads, 2 * head_size], heads and channels contiguous; written.
        kv_row_index: int64 [R], KV row of each.

    """
    rows, kv_heads, size = key.shape
    channels = kv_heads * size
    _write[(rows, triton.cdiv(channels, _CHANNELS))](
        key, value, kv_rows, kv_row_index, key.stride(0), value.stride(0), kv_rows.stride(0), channels,
        SIZE=size, CHANNELS=min(_CHANNELS, triton.next_power_of_2(channels)),
    )  # fmt: skip
