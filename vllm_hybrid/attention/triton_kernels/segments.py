"""Means and sums over the virtual positions of each live row, in a fixed order and without atomics.

To move: every copy once, every row once; a text row has one copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHANNELS = 512


@triton.jit
def _mean(copies, by_row, row_start, out, copies_stride, out_stride, channels, CHANNELS: tl.constexpr):
    row = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.load(row_start + row)
    end = tl.load(row_start + row + 1)
    if begin == end:
        return
    acc = tl.zeros([CHANNELS], tl.float32)
    for place in range(begin, end):
        copy = tl.load(by_row + place).to(tl.int64)
        acc += tl.load(copies + copy * copies_stride + channel, mask=channel < channels, other=0.0).to(
            tl.float32
        )
    mean = acc / (end - begin).to(tl.float32)
    to = out + row.to(tl.int64) * out_stride + channel
    tl.store(to, mean.to(out.dtype.element_ty), mask=channel < channels)


@triton.jit
def _sum(values, by_row, row_start, out):
    row = tl.program_id(0)
    acc = 0.0
    for place in range(tl.load(row_start + row), tl.load(row_start + row + 1)):
        acc += tl.load(values + tl.load(by_row + place))
    tl.store(out + row, acc)


def segment_mean(
    copies: torch.Tensor, by_row: torch.Tensor, row_start: torch.Tensor, out: torch.Tensor
) -> None:
    """Average the copies of each live row's query.

    Args:
        copies: [N, heads, head_size], contiguous.
        by_row: int32 [N], copies in the order of their live rows.
        row_start: int32 [R + 1], a live row's stretch of ``by_row``.
        out: [R, heads, head_size], heads and channels contiguous; written where a row has copies.

    """
    rows, channels = row_start.shape[0] - 1, copies.shape[1] * copies.shape[2]
    _mean[(rows, triton.cdiv(channels, _CHANNELS))](
        copies, by_row, row_start, out, copies.stride(0), out.stride(0), channels, CHANNELS=_CHANNELS
    )


def segment_sum(values: torch.Tensor, by_row: torch.Tensor, row_start: torch.Tensor) -> torch.Tensor:
    """float32 [R]: the sum of each live row's values (float32 [N]); the other arguments as above."""
    out = torch.empty(row_start.shape[0] - 1, dtype=torch.float32, device=values.device)
    _sum[(out.shape[0],)](values, by_row, row_start, out)
    return out
