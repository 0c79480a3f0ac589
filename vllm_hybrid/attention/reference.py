"""The readable oracle of virtual unmerging attention: plain torch, a loop over requests, nothing clever.

The fast implementations are held to it, and it to the definition. ``VLLM_HYBRID_ATTENTION=reference`` serves
with it; nothing else in a server imports it.
"""

from __future__ import annotations

import torch

from vllm_hybrid.attention.interface import AttentionOps, AttentionPlan, TierBatch, VirtualKeys, rotate
from vllm_hybrid.kv.page_facts import COUNT, START, held_patches


class ReferenceAttention(AttentionOps[VirtualKeys, AttentionPlan[VirtualKeys]]):
    """Every operation as its definition reads."""

    def build_key_index(
        self,
        facts: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        patches: int,
        kv_rows_per_block: int,
    ) -> VirtualKeys:
        return build_key_index(facts, block_table, seq_lens, patches, kv_rows_per_block)

    def plan(self, batch: TierBatch, key_index: VirtualKeys) -> AttentionPlan[VirtualKeys]:
        return AttentionPlan(batch, key_index)

    def attend(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: AttentionPlan[VirtualKeys],
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        batch = plan.batch
        for request in range(len(batch.query_start_loc_cpu) - 1):
            row, position, copies = _virtual_queries(query, batch, request, cos_sin_cache)
            if row.numel() == 0:
                continue
            _, key_position, key, value = _virtual_keys(kv_rows, plan.key_index, request, cos_sin_cache)
            weight = _softmax(copies, key, key_position <= position[:, None], scale)
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            result = torch.einsum("hqk,khd->qhd", weight, value)
            first, last = batch.live_stretch(request)
            total = torch.zeros(last - first, *query.shape[1:])
            total.index_add_(0, row - first, result)
            copies_of = torch.bincount(row - first, minlength=last - first)
            out[first:last] = (total / copies_of[:, None, None]).to(out.dtype)

    def importance(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: AttentionPlan[VirtualKeys],
        cos_sin_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        batch, keys = plan.batch, plan.key_index
        importance = torch.zeros(query.shape[0])
        for asking in batch.ranking_queries:
            request = asking.request
            _, position, copies = _virtual_queries(query, batch, request, cos_sin_cache)
            row, key_position, key, _ = _virtual_keys(kv_rows, keys, request, cos_sin_cache)
            # Every row stands in the lower tier, so the copies follow the virtual rows.
            at = asking.row - batch.query_start_loc_cpu[request]
            weight = _softmax(copies[at, None], key, key_position <= position[at], scale)[:, 0].sum(0)
            received = torch.zeros(int(keys.row_ptr[-1])).index_add_(0, row, weight)
            first, last = batch.live_rows(asking.first_row, asking.row + 1)
            # A step's live rows are the last of their request's rows in the pages.
            offset = int(keys.row_ptr[request + 1]) - batch.live_stretch(request)[1]
            importance[first:last] = received[first + offset : last + offset]
        return importance


def build_key_index(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    kv_rows_per_block: int,
) -> VirtualKeys:
    """See :meth:`vllm_hybrid.attention.interface.AttentionOps.build_key_index`."""
    block_size = facts.shape[1]
    row_ptr, member_ptr = [0], [0]
    kv_row_index: list[int] = []
    is_image: list[bool] = []
    member_pos: list[int] = []

    def add(slot: int, table: list[int], image: bool, members: list[int]) -> None:
        kv_row_index.append(table[slot // block_size] * kv_rows_per_block + slot % block_size)
        is_image.append(image)
        member_pos.extend(members)
        member_ptr.append(len(member_pos))

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
                own = facts[table[slot // block_size], slot % block_size]
                add(slot, table, True, [position + p for p in held_patches(own, patches)])
            position += patches
        row_ptr.append(len(kv_row_index))

    def longs(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    images = torch.tensor(is_image, dtype=torch.bool)
    return VirtualKeys(longs(row_ptr), longs(kv_row_index), images, longs(member_ptr), longs(member_pos))


def _virtual_queries(
    query: torch.Tensor, batch: TierBatch, request: int, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, positions and rotated copies of one request's queries, one per virtual position."""
    stretch = slice(batch.query_start_loc_cpu[request], batch.query_start_loc_cpu[request + 1])
    row = batch.row_plan.row_of[stretch]
    kept = row >= 0
    row, position = row[kept], batch.positions[stretch][kept]
    copies = query[row].float()
    rotated = rotate(copies, cos_sin_cache[position])
    is_image = batch.row_plan.image[row] >= 0
    return row, position, torch.where(is_image[:, None, None], rotated, copies)


def _virtual_keys(
    kv_rows: torch.Tensor, keys: VirtualKeys, request: int, cos_sin_cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row numbers, positions, keys and values of one request, one per virtual position."""
    rows = torch.arange(int(keys.row_ptr[request]), int(keys.row_ptr[request + 1]))
    row = rows.repeat_interleave((keys.member_ptr[1:] - keys.member_ptr[:-1])[rows])
    members = slice(
        int(keys.member_ptr[keys.row_ptr[request]]), int(keys.member_ptr[keys.row_ptr[request + 1]])
    )
    position = keys.member_pos[members]
    key, value = kv_rows[keys.kv_row_index[row]].float().chunk(2, dim=-1)
    rotated = rotate(key, cos_sin_cache[position])
    return row, position, torch.where(keys.is_image[row][:, None, None], rotated, key), value


def _softmax(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention probabilities [heads, queries, keys]; every group of query heads shares a key head."""
    group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
