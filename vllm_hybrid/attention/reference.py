"""Virtual token unmerging: attention as if each merged token stood at all of its patches' positions.

This file holds the plain torch implementation, the readable oracle of the fast ones. Every implementation
offers the same two functions over the same :class:`TierBatch`:

* ``attend``: keys enter the softmax once per member position, rotated to it; a merged token's query
  attends once per member position, causally by virtual position, and its output is the mean over the
  copies (DyMU, arXiv 2504.17040, section 3.2, without materialising the sequence in any linear layer).
* ``attention_mass``: what the last query of a request gives to each of its rows (FastV's importance).
"""

from __future__ import annotations

import torch

from vllm_hybrid.attention.interface import TierBatch, VirtualKeys, rotate
from vllm_hybrid.kv.page_facts import COUNT, START, held_patches


def write_pages(key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Store the keys and values of a step's live rows.

    Args:
        key: [R, kv_heads, head_size], image rows unrotated.
        value: [R, kv_heads, head_size].
        pages: rows of :func:`page_rows`.
        slots: int64 [R], page row of each.

    """
    pages.index_copy_(0, slots, torch.cat([key, value], dim=-1).to(pages.dtype))


def _virtual_queries(
    query: torch.Tensor, batch: TierBatch, request: int, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, positions and rotated copies of one request's queries, one per virtual position."""
    stretch = slice(batch.query_start[request], batch.query_start[request + 1])
    row = batch.plan.row_of[stretch]
    kept = row >= 0
    row, position = row[kept], batch.positions[stretch][kept]
    copies = query[row].float()
    turned = rotate(copies, angles[position])
    is_image = batch.plan.image[row] >= 0
    return row, position, torch.where(is_image[:, None, None], turned, copies)


def _virtual_keys(
    pages: torch.Tensor, keys: VirtualKeys, request: int, angles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row numbers, positions, keys and values of one request, one per virtual position."""
    rows = torch.arange(int(keys.row_ptr[request]), int(keys.row_ptr[request + 1]))
    row = rows.repeat_interleave((keys.member_ptr[1:] - keys.member_ptr[:-1])[rows])
    members = slice(
        int(keys.member_ptr[keys.row_ptr[request]]), int(keys.member_ptr[keys.row_ptr[request + 1]])
    )
    position = keys.member_pos[members]
    key, value = pages[keys.row_page[row]].float().chunk(2, dim=-1)
    turned = rotate(key, angles[position])
    return row, position, torch.where(keys.row_image[row][:, None, None], turned, key), value


def _softmax(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention probabilities [heads, queries, keys]; every group of query heads shares a key head."""
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: TierBatch,
    angles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Virtual unmerging attention of every live row of a step.

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        pages: rows of :func:`page_rows`, this step's keys and values written.
        batch: the step.
        angles: float32 [positions, head_size] of :func:`rotation_angles`.
        scale: factor on the scores.
        out: [R, heads, head_size], written.

    """
    for request in range(len(batch.query_start) - 1):
        row, position, copies = _virtual_queries(query, batch, request, angles)
        if row.numel() == 0:
            continue
        _, key_position, key, value = _virtual_keys(pages, batch.keys, request, angles)
        weight = _softmax(copies, key, key_position <= position[:, None], scale)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        result = torch.einsum("hqk,khd->qhd", weight, value)
        first, last = batch.live_stretch(request)
        total = torch.zeros(last - first, *query.shape[1:])
        total.index_add_(0, row - first, result)
        copies_of = torch.bincount(row - first, minlength=last - first)
        out[first:last] = (total / copies_of[:, None, None]).to(out.dtype)


def attention_mass(
    query: torch.Tensor, pages: torch.Tensor, batch: TierBatch, angles: torch.Tensor, scale: float
) -> torch.Tensor:
    """What each ranked request's last query gives to the live rows of the step (FastV, section 3.2).

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        pages: rows of :func:`page_rows`, this step's keys and values written.
        batch: the step; ``batch.ranked`` names the requests.
        angles: float32 [positions, head_size].
        scale: factor on the scores.

    Returns:
        float32 [R]: attention mass summed over the given heads and each row's member positions; zero
        for rows of other requests.

    """
    mass = torch.zeros(query.shape[0])
    for request in batch.ranked:
        _, position, copies = _virtual_queries(query, batch, request, angles)
        row, key_position, key, _ = _virtual_keys(pages, batch.keys, request, angles)
        weight = _softmax(copies[-1:], key, key_position <= position[-1:, None], scale)[:, 0].sum(0)
        received = torch.zeros(int(batch.keys.row_ptr[-1])).index_add_(0, row, weight)
        first, last = batch.live_stretch(request)
        end = int(batch.keys.row_ptr[request + 1])
        mass[first:last] = received[end - (last - first) : end]
    return mass


def walk_pages(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    rows_per_block: int,
) -> VirtualKeys:
    """Read every request's virtual key list from its live pages (the readable reference).

    Args:
        facts: int32 [blocks, block_size, words], the tier's page facts.
        block_table: int32 [requests, blocks per request]; entries inside holes may be stale and are
            never read.
        seq_lens: int [requests], virtual length of each request.
        patches: patches of an image.
        rows_per_block: page rows between two blocks of one layer.

    Returns:
        The key lists.

    Raises:
        RuntimeError: a page holds another request's image.

    """
    block_size = facts.shape[1]
    keys: dict[str, list] = {
        "row_ptr": [0],
        "row_page": [],
        "row_image": [],
        "member_ptr": [0],
        "member_pos": [],
    }

    def add(slot: int, table: list[int], is_image: bool, members: list[int]) -> None:
        keys["row_page"].append(table[slot // block_size] * rows_per_block + slot % block_size)
        keys["row_image"].append(is_image)
        keys["member_pos"].extend(members)
        keys["member_ptr"].append(len(keys["member_pos"]))

    for table, length in zip(block_table.tolist(), seq_lens.tolist(), strict=True):
        position = 0
        while position < length:
            head = facts[table[position // block_size], position % block_size]
            start = int(head[START])
            if start == 0:
                add(position, table, False, [position])
                position += 1
                continue
            count = int(head[COUNT])
            fits = 1 <= count <= patches and position + patches <= length
            if not fits or start - 1 != position:
                raise RuntimeError(
                    f"page facts of slot {position} name image start {start - 1} and {count} live rows: the "
                    "page holds another request's data"
                )
            for slot in range(position, position + count):
                mine = facts[table[slot // block_size], slot % block_size]
                add(slot, table, True, [position + p for p in held_patches(mine, patches)])
            position += patches
        keys["row_ptr"].append(len(keys["row_page"]))
    tensors = {
        name: torch.tensor(values, dtype=torch.bool if name == "row_image" else torch.int64)
        for name, values in keys.items()
    }
    return VirtualKeys(**tensors)
