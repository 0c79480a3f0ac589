"""Prefill on a GPU: keys and queries at all their positions in scratch, dense attention, mean of copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_hybrid.attention.interface import TierBatch
from vllm_hybrid.attention.triton_kernels.dense import DenseAttention
from vllm_hybrid.attention.triton_kernels.expand import expand_keys, expand_queries
from vllm_hybrid.attention.triton_kernels.lists import KeyLists, QueryLists, query_lists
from vllm_hybrid.attention.triton_kernels.segments import segment_mean

SCRATCH_KEYS = 16384
"""Keys that are expanded at once, where no request alone has more."""


@dataclass
class Group:
    """Consecutive requests whose keys are expanded together; the first and the last of them prefill.

    Attributes:
        first: the first request.
        end: one past the last.
        key_bound: most keys of all, on the host.
        longest_key: most keys of one.
        longest_query: most virtual queries of one.
        query_start: int32 [requests + 1], a request's stretch of the step's virtual queries.
        key_start: int32 [requests + 1], a request's stretch of the group's keys: none where it decodes.

    """

    first: int
    end: int
    key_bound: int
    longest_key: int
    longest_query: int
    query_start: torch.Tensor
    key_start: torch.Tensor


@dataclass
class PrefillPlan:
    """The prefilling requests of a step.

    Attributes:
        queries: the virtual queries of the step, those of decodes too: their answers come from elsewhere.
        groups: what is expanded at once.
        own_rows: whether the step's own rows, all of them text, are all that the prefilling requests have:
            then nothing needs to be expanded.

    """

    queries: QueryLists
    groups: list[Group]
    own_rows: bool


def plan_prefill(batch: TierBatch, keys: KeyLists, decode_rows: torch.Tensor) -> PrefillPlan:
    """Sort the prefilling requests of a step; the host does not wait for the device.

    Args:
        batch: the step's rows.
        keys: the virtual keys of its requests.
        decode_rows: int32 [requests], negative for those that bring several rows.

    """
    rows = batch.row_counts
    queries = query_lists(batch.row_plan.row_of, batch.positions, batch.row_plan.image, batch.query_start_loc)
    bounds = [bound if own > 1 else 0 for own, bound in zip(rows, batch.length_bounds, strict=True)]
    text = not batch.has_images
    own_rows = text and all(own == bound for own, bound in zip(rows, bounds, strict=True) if own > 1)
    key_count = torch.where(decode_rows < 0, keys.count.clamp(min=0), 0)
    groups: list[Group] = []
    for first, end in _cut(bounds, SCRATCH_KEYS):
        key_start = F.pad(key_count[first:end].cumsum(0, dtype=torch.int32), (1, 0))
        groups.append(
            Group(
                first=first,
                end=end,
                key_bound=sum(bounds[first:end]),
                longest_key=max(bounds[first:end]),
                longest_query=max(rows[first:end]),
                query_start=queries.start[first : end + 1],
                key_start=key_start,
            )
        )
    return PrefillPlan(queries, groups, own_rows)


def _cut(bounds: list[int], most: int) -> list[tuple[int, int]]:
    """Stretches of requests whose bounds add up to ``most``, or that are one request of more.

    Each begins and ends with a request that has a bound; those without stand inside of one or in none.
    """
    cuts: list[tuple[int, int]] = []
    total = 0
    for number, bound in enumerate(bounds):
        if not bound:
            continue
        if cuts and total + bound <= most:
            cuts[-1] = cuts[-1][0], number + 1
            total += bound
        else:
            cuts.append((number, number + 1))
            total = bound
    return cuts


def prefill(
    query: torch.Tensor,
    kv_rows: torch.Tensor,
    plan: PrefillPlan,
    keys: KeyLists,
    dense: DenseAttention,
    cos_sin_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend from every prefilling request; see :meth:`vllm_hybrid.attention.interface.AttentionOps.attend`.

    Args:
        query: [R, heads, head_size], text rows rotated, image rows not.
        kv_rows: [rows, kv_heads, 2 * head_size], key then value of every KV row.
        plan: the step's.
        keys: the virtual keys of the step's requests.
        dense: who attends.
        cos_sin_cache: float32 [positions, head_size], cosines then sines.
        scale: factor on the scores.
        out: [R, heads, head_size]; written, with no answer in rows of decodes.

    """
    heads, size = query.shape[1:]
    queries = plan.queries
    expanded = query.new_empty(queries.row.shape[0], heads, size)
    copies = torch.empty_like(expanded)
    expand_queries(query, queries, cos_sin_cache, expanded)
    # One tensor for all groups, so that its memory is the same piece from layer to layer.
    room = max(group.key_bound for group in plan.groups)
    keys_and_values = query.new_empty(2, room, kv_rows.shape[1], size)
    for group in plan.groups:
        key, value = keys_and_values[:, : group.key_bound]
        requests = slice(group.first, group.end)
        expand_keys(kv_rows, keys, requests, group.key_start, group.longest_key, cos_sin_cache, key, value)
        dense(
            expanded,
            key,
            value,
            group.query_start,
            group.key_start,
            group.longest_query,
            group.longest_key,
            scale,
            copies,
        )
    segment_mean(copies, queries.by_row, queries.row_start, out)


def scratch_bytes(
    rows: int, positions: int, heads: int, kv_heads: int, head_size: int, number_bytes: int
) -> int:
    """Bytes that :func:`prefill` allocates at most.

    Args:
        rows: virtual rows of a step, at most.
        positions: of a request, at most.
        heads: query heads.
        kv_heads: key heads.
        head_size: channels of a head.
        number_bytes: bytes of a number.

    """
    keys = max(SCRATCH_KEYS, positions)
    return 2 * (rows * heads + keys * kv_heads) * head_size * number_bytes
