"""Virtual unmerging attention on a GPU: the Triton kernels behind :class:`AttentionOps`.

Nothing here waits for the device. Shapes follow from what the host knows before the step; everything that
changes from one replay of a captured decode graph to the next is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from vllm_hybrid.attention.gpu_tower import GpuTower
from vllm_hybrid.attention.interface import AttentionOps, AttentionPlan, TierBatch
from vllm_hybrid.attention.triton_kernels.decode import decode
from vllm_hybrid.attention.triton_kernels.importance import importance
from vllm_hybrid.attention.triton_kernels.key_index import build_key_index
from vllm_hybrid.attention.triton_kernels.lists import KeyLists, QueryLists, new_key_lists, query_lists
from vllm_hybrid.attention.triton_kernels.prefill import prefill
from vllm_hybrid.attention.triton_kernels.segments import segment_mean
from vllm_hybrid.method.row_plan import to_device


@dataclass
class GpuPlan(AttentionPlan[KeyLists]):
    """A step sorted into decodes and prefills; each kind takes one call per layer.

    Attributes:
        decode_rows: int32 [requests], live row of each request that brings one virtual row, else -1.
        queries: virtual queries of the requests that bring several; None in a step of decodes alone.
        ranking: int32 [ranking queries, 3], request, virtual row and first row of each; None where none
            ranks.

    """

    decode_rows: torch.Tensor
    queries: QueryLists | None
    ranking: torch.Tensor | None


class GpuAttention(AttentionOps[KeyLists, GpuPlan]):
    """The operations as Triton kernels.

    A device raises nothing: a page that holds another request's data leaves its request without keys, and is
    flagged.
    """

    flags_foreign_pages = True
    device_tower = GpuTower()

    def build_key_index(
        self,
        facts: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        patches: int,
        kv_rows_per_block: int,
    ) -> KeyLists:
        width = block_table.shape[1] * facts.shape[1]
        keys = new_key_lists(block_table.shape[0], width, facts.device)
        build_key_index(facts, block_table, seq_lens, patches, kv_rows_per_block, keys)
        return keys

    def flag_foreign_pages(self, key_index: KeyLists, flags: torch.Tensor) -> None:
        torch.lt(key_index.count, 0, out=flags)

    def plan(self, batch: TierBatch, key_index: KeyLists) -> GpuPlan:
        starts = batch.query_start_loc_cpu
        requests = len(starts) - 1
        device = batch.query_start_loc.device
        if starts == list(range(requests + 1)):
            # One row each. A captured graph replays this for fewer requests too: those that fill it up have
            # no keys, so their rows are answered with 0 and nothing stays unwritten.
            rows = torch.arange(requests, dtype=torch.int32, device=device)
            return GpuPlan(batch, key_index, rows, None, None)
        ends = batch.query_start_loc[1:] - 1
        # Padding requests stretch over nothing and end one row before the first.
        row = batch.row_plan.row_of[ends.clamp(min=0)].int()
        decode_rows = torch.where(batch.query_start_loc.diff() == 1, row, -1)
        if all(end - start <= 1 for start, end in zip(starts, starts[1:], strict=False)):
            return GpuPlan(batch, key_index, decode_rows, None, None)
        queries = query_lists(
            batch.row_plan.row_of, batch.positions, batch.row_plan.image, batch.query_start_loc
        )
        ranking = None
        if batch.ranking_queries:
            given = [(one.request, one.row, one.first_row) for one in batch.ranking_queries]
            ranking = to_device(list(chain(*given)), device).int().view(-1, 3)
        return GpuPlan(batch, key_index, decode_rows, queries, ranking)

    def attend(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: GpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if plan.queries is not None:
            copies = query.new_empty(plan.queries.row.shape[0], *query.shape[1:])
            keys, queries = plan.key_index, plan.queries
            prefill(query, kv_rows, keys, queries, plan.decode_rows, cos_sin_cache, scale, copies)
            # Rows of decodes get a mean of nothing here, and their answer below.
            segment_mean(copies, queries.by_row, queries.row_start, out)
        decode(query, plan.decode_rows, kv_rows, plan.key_index, cos_sin_cache, scale, out)

    def importance(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: GpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert plan.queries is not None and plan.ranking is not None, "only a step with images ranks"
        return importance(query, kv_rows, plan.key_index, plan.queries, plan.ranking, cos_sin_cache, scale)
