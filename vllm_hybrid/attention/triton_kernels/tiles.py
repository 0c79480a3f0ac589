"""Pieces that the attention kernels share: gathering rows as two halves, rotating them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_halves(base, rows, row_stride, there, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Both halves, float32 [n, HALF_PAD] each, of the rows ``base + rows * row_stride``; zero elsewhere."""
    channel = tl.arange(0, HALF_PAD)
    at = base + rows.to(tl.int64)[:, None] * row_stride + channel[None, :]
    mask = there[:, None] & (channel < HALF)[None, :]
    return (
        tl.load(at, mask=mask, other=0.0).to(tl.float32),
        tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def rotate(first, second, pos, cos_sin_cache, there, HALF: tl.constexpr, HALF_PAD: tl.constexpr):
    """Halves rotated to positions ``pos`` (RoPE, half-split); nothing is read where all of them are 0."""
    if tl.max(pos, axis=0) > 0:
        channel = tl.arange(0, HALF_PAD)
        at = cos_sin_cache + pos.to(tl.int64)[:, None] * (2 * HALF) + channel[None, :]
        mask = there[:, None] & (channel < HALF)[None, :]
        cos = tl.load(at, mask=mask, other=0.0)
        sin = tl.load(at + HALF, mask=mask, other=0.0)
        before = first
        first = before * cos - second * sin
        second = second * cos + before * sin
    return first, second
