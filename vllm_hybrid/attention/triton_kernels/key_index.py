"""Virtual key lists read from live pages, one program per request.

To move per request: the first word of the facts of every text slot (a 32-byte sector each), all facts of the
image's live rows (80 bytes each), 8 bytes per virtual key written. At 640 positions and 90 live rows that is
about 14 KB, next to megabytes of keys and values; what it takes is latency, a few dependent reads per image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.lists import KeyLists
from vllm_hybrid.kv.page_facts import MASK

_CHUNK = 256
_ROWS = 8
_BITS = 32


@triton.jit
def _ones(x):
    """Number of ones in each int32."""
    x = x.to(tl.uint32)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _masks(facts, table, first, live, words: tl.constexpr, block_size: tl.constexpr,
           MASK_WORD: tl.constexpr, WORDS_PAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Patch masks [ROWS, WORDS_PAD] of the slots first, first + 1, ..., zero where not ``live``."""
    slot = first + tl.arange(0, ROWS)
    block = tl.load(table + slot // block_size, mask=live, other=0).to(tl.int64)
    at = (block * block_size + slot % block_size) * words
    word = tl.arange(0, WORDS_PAD)
    there = live[:, None] & (word[None, :] < words - MASK_WORD)
    return tl.load(facts + at[:, None] + MASK_WORD + word[None, :], mask=there, other=0)


@triton.jit
def _key_index(
    facts, tables, lengths, out_kv_row, out_rope_pos, out_count,
    table_stride, width, kv_rows_per_block,
    patches: tl.constexpr, words: tl.constexpr, block_size: tl.constexpr, MASK_WORD: tl.constexpr,
    WORDS_PAD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    length = tl.load(lengths + request)
    table = tables + request.to(tl.int64) * table_stride
    out_kv_row += request.to(tl.int64) * width
    out_rope_pos += request.to(tl.int64) * width
    offset = tl.arange(0, CHUNK)
    word = tl.arange(0, WORDS_PAD)
    bit = tl.arange(0, BITS)
    below = ((1 << bit.to(tl.int64)) - 1).to(tl.int32)
    position = 0
    filled = 0
    foreign = 0
    while position < length:
        # Text up to the first slot that starts an image. What stands in a hole is read along with the rest
        # of a chunk but looked at only up to the first image.
        slot = position + offset
        inside = slot < length
        block = tl.load(table + slot // block_size, mask=inside, other=0).to(tl.int64)
        at = block * block_size + slot % block_size
        start = tl.load(facts + at * words, mask=inside, other=0)
        text = tl.min(tl.where(start != 0, offset, CHUNK), axis=0)
        text = tl.minimum(text, length - position)
        row = (block * kv_rows_per_block + slot % block_size).to(tl.int32)
        tl.store(out_kv_row + filled + offset, row, mask=offset < text)
        tl.store(out_rope_pos + filled + offset, tl.zeros_like(row), mask=offset < text)
        image = tl.sum(tl.where(offset == text, start, 0), axis=0)
        head = tl.sum(tl.where(offset == text, at, 0), axis=0)
        filled += text
        position += text
        if image != 0:
            live_rows = tl.load(facts + head * words + 1)
            # Nothing is read or written past a request's own lists, whatever the facts say.
            fits = (live_rows > 0) & (live_rows <= patches) & (position + patches <= length)
            if fits & (image - 1 == position):
                # Every patch has one holder, so the sum of the masks is their union.
                union = tl.zeros([WORDS_PAD], dtype=tl.int32)
                for first in range(0, live_rows, ROWS):
                    live = first + tl.arange(0, ROWS) < live_rows
                    mine = _masks(facts, table, position + first, live, words, block_size, MASK_WORD,
                                  WORDS_PAD, ROWS)  # fmt: skip
                    union += tl.sum(mine, axis=0)
                ones = _ones(union)
                before = tl.cumsum(ones, axis=0) - ones
                place = before[:, None] + _ones(union[:, None] & below[None, :])
                patch = word[:, None] * BITS + bit[None, :]
                held = (((union[:, None] >> bit[None, :]) & 1) != 0) & (patch < patches)
                tl.store(out_rope_pos + filled + place, position + patch, mask=held)
                for first in range(0, live_rows, ROWS):
                    number = first + tl.arange(0, ROWS)
                    live = number < live_rows
                    mine = _masks(facts, table, position + first, live, words, block_size, MASK_WORD,
                                  WORDS_PAD, ROWS)  # fmt: skip
                    its = position + number
                    its_block = tl.load(table + its // block_size, mask=live, other=0).to(tl.int64)
                    its_row = (its_block * kv_rows_per_block + its % block_size).to(tl.int32)
                    its_own = (((mine[:, :, None] >> bit[None, None, :]) & 1) != 0) & held[None, :, :]
                    tl.store(
                        out_kv_row + filled + place[None, :, :] + tl.zeros_like(its_own).to(tl.int32),
                        its_row[:, None, None] + tl.zeros_like(its_own).to(tl.int32),
                        mask=its_own,
                    )
                filled += tl.minimum(tl.sum(ones, axis=0), patches)
                position += patches
            else:
                foreign = 1
                position = length
    tl.store(out_count + request, tl.where(foreign != 0, -1, filled))


def build_key_index(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    kv_rows_per_block: int,
    out: KeyLists,
) -> None:
    """Read every request's virtual keys from its live pages; see
    :meth:`vllm_hybrid.attention.interface.AttentionOps.build_key_index`.

    Args:
        facts: int32 [blocks, block_size, words], the tier's page facts.
        block_table: int32 [requests, blocks per request]; entries inside holes may be stale: their facts may
            be read, but nothing follows from them.
        seq_lens: int32 [requests], virtual length of each request.
        patches: patches of an image.
        kv_rows_per_block: KV rows between two blocks of one layer.
        out: the lists, as wide as the longest request; written.

    """
    requests = block_table.shape[0]
    block_size, words = facts.shape[1:]
    _key_index[(requests,)](
        facts, block_table, seq_lens, out.kv_row_index, out.rope_pos, out.count,
        block_table.stride(0), out.kv_row_index.stride(0), kv_rows_per_block,
        patches=patches, words=words, block_size=block_size, MASK_WORD=MASK,
        WORDS_PAD=triton.next_power_of_2(words - MASK), CHUNK=_CHUNK, ROWS=_ROWS, BITS=_BITS,
    )  # fmt: skip
