"""Virtual unmerging attention on a GPU: the Triton kernels behind the functions that vLLM's glue calls.

Nothing here waits for the device. Shapes follow from what the host knows before the step; everything that
changes from one replay of a captured decode graph to the next is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_hybrid.attention.interface import TierBatch
from vllm_hybrid.attention.triton_kernels.decode import decode
from vllm_hybrid.attention.triton_kernels.lists import KeyLists, QueryLists, new_key_lists, query_lists
from vllm_hybrid.attention.triton_kernels.mass import attention_mass as _mass
from vllm_hybrid.attention.triton_kernels.prefill import prefill
from vllm_hybrid.attention.triton_kernels.segments import segment_mean
from vllm_hybrid.attention.triton_kernels.walk import walk_pages as _walk
from vllm_hybrid.method.row_plan import to_device


@dataclass
class GpuPlan:
    """A step sorted into decodes and prefills; each kind takes one call per layer.

    Attributes:
        decode_rows: int32 [requests], live row of each request that brings one virtual row, else -1.
        queries: virtual queries of the requests that bring several; None in a step of decodes alone.
        ranked: int32 [requests], 1 where the last query ranks image tokens; None where none does.

    """

    decode_rows: torch.Tensor
    queries: QueryLists | None
    ranked: torch.Tensor | None


def walk_pages(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    rows_per_block: int,
) -> KeyLists:
    """Every request's virtual key list, read from its live pages; see :mod:`vllm_hybrid.method.row_plan`.

    A device raises nothing: a page that holds another request's data leaves its request without keys, and
    :func:`mark_foreign` says so.
    """
    width = block_table.shape[1] * facts.shape[1]
    keys = new_key_lists(block_table.shape[0], width, facts.device)
    _walk(facts, block_table, seq_lens, patches, rows_per_block, keys)
    return keys


def mark_foreign(keys: KeyLists, out: torch.Tensor) -> None:
    """Write into bool [requests] whose pages held another request's data."""
    torch.lt(keys.count, 0, out=out)


def plan_attention(batch: TierBatch) -> GpuPlan:
    """Sort a step's requests; done once per tier and step, used by every layer of the tier."""
    starts = batch.query_start
    requests = len(starts) - 1
    if starts == list(range(requests + 1)):
        # One row each. A captured graph replays this for fewer requests too: those that fill it up have no
        # keys, so their rows are answered with 0 and nothing stays unwritten.
        rows = torch.arange(requests, dtype=torch.int32, device=batch.query_ptr.device)
        return GpuPlan(rows, None, None)
    ends = batch.query_ptr[1:] - 1
    # Padding requests stretch over nothing and end one row before the first.
    row = batch.plan.row_of[ends.clamp(min=0)].int()
    decode_rows = torch.where(batch.query_ptr.diff() == 1, row, -1)
    if all(end - start <= 1 for start, end in zip(starts, starts[1:], strict=False)):
        return GpuPlan(decode_rows, None, None)
    queries = query_lists(batch.plan.row_of, batch.positions, batch.plan.image, batch.query_ptr)
    ranked = None
    if batch.ranked:
        device = batch.query_ptr.device
        ranked = torch.zeros(requests, dtype=torch.int32, device=device)
        ranked.index_fill_(0, to_device(batch.ranked, device), 1)
    return GpuPlan(decode_rows, queries, ranked)


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: TierBatch,
    plan: GpuPlan,
    angles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """:func:`vllm_hybrid.attention.reference.attend`, given the plan of :func:`plan_attention`."""
    if plan.queries is not None:
        copies = query.new_empty(plan.queries.row.shape[0], *query.shape[1:])
        prefill(query, pages, batch.keys, plan.queries, plan.decode_rows, angles, scale, copies)
        # Rows of decodes get a mean of nothing here, and their answer below.
        segment_mean(copies, plan.queries.by_row, plan.queries.row_start, out)
    decode(query, plan.decode_rows, pages, batch.keys, angles, scale, out)


def attention_mass(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: TierBatch,
    plan: GpuPlan,
    angles: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """:func:`vllm_hybrid.attention.reference.attention_mass`, given the plan of :func:`plan_attention`."""
    assert plan.queries is not None and plan.ranked is not None, "only a step with images ranks"
    return _mass(query, pages, batch.keys, plan.queries, plan.ranked, angles, scale)
