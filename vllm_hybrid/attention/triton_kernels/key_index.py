"""A request's keys read from its live pages, one program per request.

To move per request: the first word of the facts of every text slot (a 32-byte sector each), all facts of the
image's live rows (80 bytes each, once for the lists by row and twice for those by position), 4 bytes per text
row, 8 per segment, 4 per position, and 8 per virtual key where it is listed by position. At 640 positions
and 90 live rows that is about 14 KB, next to megabytes of keys and values; what it takes is latency, a few
dependent reads per image.

In a step of decodes alone the same program notes what its request's new row needs: the row's own facts and
where its key and value go. So the plan of such a step is one kernel for each tier.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_hybrid.attention.triton_kernels.lists import SEGMENT, KeyLists
from vllm_hybrid.kv.page_facts import COUNT, MASK, START

_CHUNK = 256
_ROWS = 8
_WARPS = 8
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
def _kv_rows(table, slot, live, kv_rows_per_block, block_size: tl.constexpr):
    """KV row and row of facts, int64, of some slots of a request; of block 0 where not ``live``."""
    block = tl.load(table + slot // block_size, mask=live, other=0).to(tl.int64)
    return block * kv_rows_per_block + slot % block_size, block * block_size + slot % block_size


@triton.jit
def _masks(
    facts, fact_row, live, patches: tl.constexpr, words: tl.constexpr, MASK_WORD: tl.constexpr,
    WORDS_PAD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Patch masks [ROWS, WORDS_PAD] of some rows of facts, zero where not ``live`` and behind the patches."""
    word = tl.arange(0, WORDS_PAD)
    there = live[:, None] & (word[None, :] < words - MASK_WORD)
    mask = tl.load(facts + fact_row[:, None] * words + MASK_WORD + word[None, :], mask=there, other=0)
    inside = tl.minimum(tl.maximum(patches - word * BITS, 0), BITS).to(tl.int64)
    one = tl.full([WORDS_PAD], 1, tl.int64)
    return mask & ((one << inside) - 1).to(tl.int32)[None, :]


@triton.jit
def _list_segments(
    facts, table, start, live_rows, segment_row, segment_start, position, segments, members,
    kv_rows_per_block, patches: tl.constexpr, words: tl.constexpr, block_size: tl.constexpr,
    MASK_WORD: tl.constexpr, WORDS_PAD: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    SEGMENT: tl.constexpr,
):  # fmt: skip
    """List an image's rows with their positions behind those of the images before it; counts them."""
    word = tl.arange(0, WORDS_PAD)
    bit = tl.arange(0, BITS)
    below = ((1 << bit.to(tl.int64)) - 1).to(tl.int32)
    patch = word[:, None] * BITS + bit[None, :]
    most = members + patches
    most_segments = segments + patches
    for first in range(0, live_rows, ROWS):
        number = first + tl.arange(0, ROWS)
        live = number < live_rows
        kv_row, fact_row = _kv_rows(table, start + number, live, kv_rows_per_block, block_size)
        mine = _masks(facts, fact_row, live, patches, words, MASK_WORD, WORDS_PAD, BITS)
        ones = _ones(mine)
        held = tl.sum(ones, axis=1)
        cut = (held + SEGMENT - 1) // SEGMENT
        before_row = members + tl.cumsum(held, axis=0) - held
        before_segment = segments + tl.cumsum(cut, axis=0) - cut
        before_word = tl.cumsum(ones, axis=1) - ones
        # A patch's number among those of its row.
        rank = before_word[:, :, None] + _ones(mine[:, :, None] & below[None, None, :])
        place = before_row[:, None, None] + rank
        own = (((mine[:, :, None] >> bit[None, None, :]) & 1) != 0) & (place < most)
        tl.store(position + place, start + patch[None, :, :] + tl.zeros_like(place), mask=own)
        segment = before_segment[:, None, None] + rank // SEGMENT
        opens = own & (rank % SEGMENT == 0) & (segment < most_segments)
        row = kv_row.to(tl.int32)[:, None, None] + tl.zeros_like(place)
        tl.store(segment_row + segment, row, mask=opens)
        tl.store(segment_start + segment, place, mask=opens)
        members += tl.sum(held, axis=0)
        segments += tl.sum(cut, axis=0)
    return segments, members


@triton.jit
def _list_by_position(
    facts, table, start, live_rows, out_kv_row, out_rope_pos, filled,
    kv_rows_per_block, patches: tl.constexpr, words: tl.constexpr, block_size: tl.constexpr,
    MASK_WORD: tl.constexpr, WORDS_PAD: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """List an image's virtual keys by position behind those that are there; counts them."""
    word = tl.arange(0, WORDS_PAD)
    bit = tl.arange(0, BITS)
    below = ((1 << bit.to(tl.int64)) - 1).to(tl.int32)
    # Every patch has one holder, so the sum of the masks is their union.
    union = tl.zeros([WORDS_PAD], dtype=tl.int32)
    for first in range(0, live_rows, ROWS):
        number = first + tl.arange(0, ROWS)
        live = number < live_rows
        _, fact_row = _kv_rows(table, start + number, live, kv_rows_per_block, block_size)
        mine = _masks(facts, fact_row, live, patches, words, MASK_WORD, WORDS_PAD, BITS)
        union += tl.sum(mine, axis=0)
    ones = _ones(union)
    before = tl.cumsum(ones, axis=0) - ones
    place = before[:, None] + _ones(union[:, None] & below[None, :])
    patch = word[:, None] * BITS + bit[None, :]
    held = ((union[:, None] >> bit[None, :]) & 1) != 0
    tl.store(out_rope_pos + filled + place, start + patch, mask=held)
    for first in range(0, live_rows, ROWS):
        number = first + tl.arange(0, ROWS)
        live = number < live_rows
        kv_row, fact_row = _kv_rows(table, start + number, live, kv_rows_per_block, block_size)
        mine = _masks(facts, fact_row, live, patches, words, MASK_WORD, WORDS_PAD, BITS)
        own = (((mine[:, :, None] >> bit[None, None, :]) & 1) != 0) & held[None, :, :]
        everywhere = tl.zeros_like(own).to(tl.int32)
        row = kv_row.to(tl.int32)[:, None, None] + everywhere
        tl.store(out_kv_row + filled + place[None, :, :] + everywhere, row, mask=own)


@triton.jit
def _key_index(
    facts, tables, lengths, slots, text_row, text_count, segment_row, segment_start, segment_count, position,
    out_kv_row, out_rope_pos, out_count, new_kv_row, foreign_flags,
    table_stride, width, kv_rows_per_block,
    patches: tl.constexpr, words: tl.constexpr, block_size: tl.constexpr, START_WORD: tl.constexpr,
    COUNT_WORD: tl.constexpr, MASK_WORD: tl.constexpr, WORDS_PAD: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, SEGMENT: tl.constexpr, DECODES: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    length = tl.load(lengths + request)
    table = tables + request.to(tl.int64) * table_stride
    own_lists = request.to(tl.int64) * width
    text_row += own_lists
    segment_row += own_lists
    segment_start += own_lists + request
    position += own_lists
    # A new row is text, which its facts do not say yet: another thread of this program writes them.
    new = length
    if DECODES:
        new = length - 1
        slot = tl.load(slots + request)
        if slot >= block_size:
            # Nothing is said of the null block, to which padding points.
            tl.store(facts + slot * words + START_WORD, 0)
        at = tl.maximum(slot, 0)
        tl.store(new_kv_row + request, at // block_size * kv_rows_per_block + at % block_size)
    else:
        out_kv_row += own_lists
        out_rope_pos += own_lists
    offset = tl.arange(0, CHUNK)
    at_position = 0
    filled = 0
    texts = 0
    segments = 0
    members = 0
    foreign = 0
    while at_position < length:
        # Text up to the first slot that starts an image. What stands in a hole is read along with the rest
        # of a chunk but looked at only up to the first image.
        slot_of = at_position + offset
        inside = slot_of < length
        kv_row, fact_row = _kv_rows(table, slot_of, inside, kv_rows_per_block, block_size)
        start = tl.load(facts + fact_row * words + START_WORD, mask=slot_of < new, other=0)
        text = tl.min(tl.where(start != 0, offset, CHUNK), axis=0)
        text = tl.minimum(text, length - at_position)
        row = kv_row.to(tl.int32)
        tl.store(text_row + texts + offset, row, mask=offset < text)
        if not DECODES:
            tl.store(out_kv_row + filled + offset, row, mask=offset < text)
            tl.store(out_rope_pos + filled + offset, tl.zeros_like(row), mask=offset < text)
        image = tl.sum(tl.where(offset == text, start, 0), axis=0)
        head = tl.sum(tl.where(offset == text, fact_row, 0), axis=0)
        filled += text
        texts += text
        at_position += text
        if image != 0:
            live_rows = tl.load(facts + head * words + COUNT_WORD)
            # Nothing is read or written past a request's own lists, whatever the facts say.
            fits = (live_rows > 0) & (live_rows <= patches) & (at_position + patches <= length)
            if fits & (image - 1 == at_position):
                before = members
                segments, members = _list_segments(
                    facts, table, at_position, live_rows, segment_row, segment_start, position, segments,
                    members, kv_rows_per_block, patches, words, block_size, MASK_WORD, WORDS_PAD, ROWS, BITS,
                    SEGMENT,
                )  # fmt: skip
                if members - before <= patches:
                    if not DECODES:
                        _list_by_position(
                            facts, table, at_position, live_rows, out_kv_row, out_rope_pos, filled,
                            kv_rows_per_block, patches, words, block_size, MASK_WORD, WORDS_PAD, ROWS, BITS,
                        )  # fmt: skip
                    filled += members - before
                    at_position += patches
                else:
                    # A patch with two holders: not what one image's rows say.
                    foreign = 1
                    at_position = length
            else:
                foreign = 1
                at_position = length
    ours = length * 0 + foreign == 0
    tl.store(segment_start + segments, members, mask=ours)
    tl.store(text_count + request, tl.where(ours, texts, 0))
    tl.store(segment_count + request, tl.where(ours, segments, 0))
    tl.store(out_count + request, tl.where(ours, filled, -1))
    if DECODES:
        tl.store(foreign_flags + request, tl.where(ours, 0, 1).to(tl.uint8))


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
        out: the lists, by position too, as wide as the longest request; written.

    """
    _launch(facts, block_table, seq_lens, patches, kv_rows_per_block, out, None)


def index_decodes(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    kv_rows_per_block: int,
    out: KeyLists,
    slots: torch.Tensor,
    foreign: torch.Tensor,
) -> torch.Tensor:
    """Note the new text row of every request of a step of decodes, and read the keys of all.

    Args:
        facts: as for :func:`build_key_index`; written at the new rows' slots.
        block_table: see there.
        seq_lens: see there; 0 where a captured step has no request.
        patches: see there.
        kv_rows_per_block: see there.
        out: the lists, by row alone; written.
        slots: int64 [requests], vLLM's slot of each request's row, negative where there is none.
        foreign: bool [requests], whether a page held another request's data; written.

    Returns:
        int64 [requests], the KV row of each new row; 0 where there is none.

    """
    new_kv_row = torch.empty_like(slots)
    _launch(facts, block_table, seq_lens, patches, kv_rows_per_block, out, (slots, new_kv_row, foreign))
    return new_kv_row


def _launch(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    kv_rows_per_block: int,
    out: KeyLists,
    decodes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> None:
    block_size, words = facts.shape[1:]
    slots, new_kv_row, foreign = decodes or (seq_lens, seq_lens, seq_lens)
    rows = out.rows
    _key_index[(block_table.shape[0],)](
        facts, block_table, seq_lens, slots, rows.text_row, rows.text_count, rows.segment_row,
        rows.segment_start, rows.segment_count, rows.position, out.kv_row_index, out.rope_pos, out.count,
        new_kv_row, foreign.view(torch.uint8) if decodes else foreign,
        block_table.stride(0), rows.text_row.stride(0), kv_rows_per_block,
        patches=patches, words=words, block_size=block_size, START_WORD=START, COUNT_WORD=COUNT,
        MASK_WORD=MASK, WORDS_PAD=triton.next_power_of_2(words - MASK), CHUNK=_CHUNK, ROWS=_ROWS, BITS=_BITS,
        SEGMENT=SEGMENT, DECODES=decodes is not None, num_warps=_WARPS,
    )  # fmt: skip
