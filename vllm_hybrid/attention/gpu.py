"""Virtual unmerging attention on a GPU: the kernels behind :class:`AttentionOps`.

Nothing here waits for the device. Shapes follow from what the host knows before the step; everything that
changes from one replay of a captured decode graph to the next is read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from vllm_hybrid.attention.gpu_tower import GpuTower
from vllm_hybrid.attention.interface import AttentionOps, AttentionPlan, DecodeStep, TierBatch
from vllm_hybrid.attention.prefill import (
    PrefillPlan,
    plan_prefill,
    prefill,
    scratch_bytes,
)
from vllm_hybrid.attention.triton_kernels.decode import decode
from vllm_hybrid.attention.triton_kernels.dense import DenseAttention, causal_attention
from vllm_hybrid.attention.triton_kernels.importance import importance
from vllm_hybrid.attention.triton_kernels.key_index import build_key_index, index_decodes
from vllm_hybrid.attention.triton_kernels.lists import KeyLists, new_key_lists
from vllm_hybrid.attention.triton_kernels.write import write
from vllm_hybrid.method.row_plan import to_device


@dataclass
class GpuPlan(AttentionPlan[KeyLists]):
    """A step sorted into decodes and prefills; each kind takes one call per layer.

    Attributes:
        decode_rows: int32 [requests], live row of each request that brings one virtual row, else -1; None in
            a step of decodes alone, where request r's is row r.
        prefill: the requests that bring several rows; None in a step of decodes alone.
        ranking: int32 [ranking queries, 3], request, virtual row and first row of each; None where none
            ranks.

    """

    decode_rows: torch.Tensor | None
    prefill: PrefillPlan | None
    ranking: torch.Tensor | None


class GpuAttention(AttentionOps[KeyLists, GpuPlan]):
    """The operations as Triton kernels; who attends among what a prefill expanded is handed in.

    A device raises nothing: a page that holds another request's data leaves its request without keys, and is
    flagged.
    """

    flags_foreign_pages = True
    compiles_on_launch = True
    device_tower = GpuTower()

    def __init__(self, dense: DenseAttention = causal_attention) -> None:
        self._dense = dense

    def write_pages(
        self, key: torch.Tensor, value: torch.Tensor, kv_rows: torch.Tensor, kv_row_index: torch.Tensor
    ) -> None:
        write(key, value, kv_rows, kv_row_index)

    def build_key_index(
        self,
        facts: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        patches: int,
        kv_rows_per_block: int,
    ) -> KeyLists:
        width = block_table.shape[1] * facts.shape[1]
        keys = new_key_lists(block_table.shape[0], width, True, facts.device)
        build_key_index(facts, block_table, seq_lens, patches, kv_rows_per_block, keys)
        return keys

    def flag_foreign_pages(self, key_index: KeyLists, flags: torch.Tensor) -> None:
        torch.lt(key_index.count, 0, out=flags)

    def plan_decodes(self, step: DecodeStep, foreign: torch.Tensor) -> GpuPlan:
        # A captured graph replays this for fewer requests too: those that fill it up have no keys, so their
        # rows are answered with 0 and nothing stays unwritten.
        requests, blocks = step.block_table.shape
        width = blocks * step.facts.shape[1]
        keys = new_key_lists(requests, width, False, step.facts.device)
        kv_row_index = index_decodes(
            step.facts,
            step.block_table,
            step.seq_lens,
            step.patches,
            step.kv_rows_per_block,
            keys,
            step.slots,
            foreign,
        )
        return GpuPlan(step.batch(kv_row_index), keys, None, None, None)

    def plan(self, batch: TierBatch, key_index: KeyLists) -> GpuPlan:
        device = batch.query_start_loc.device
        ends = batch.query_start_loc[1:] - 1
        # Padding requests stretch over nothing and end one row before the first.
        row = batch.row_plan.row_of[ends.clamp(min=0)].int()
        decode_rows = torch.where(batch.query_start_loc.diff() == 1, row, -1)
        if max(batch.row_counts) <= 1:
            return GpuPlan(batch, key_index, decode_rows, None, None)
        ranking = None
        if batch.ranking_queries:
            given = [(one.request, one.row, one.first_row) for one in batch.ranking_queries]
            ranking = to_device(list(chain(*given)), device).int().view(-1, 3)
        return GpuPlan(batch, key_index, decode_rows, plan_prefill(batch, key_index, decode_rows), ranking)

    def attend(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: GpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if plan.prefill is not None:
            # Rows of decodes get their answer below.
            prefill(query, kv_rows, plan.prefill, plan.key_index, self._dense, cos_sin_cache, scale, out)
        self._decode(query, kv_rows, plan, cos_sin_cache, scale, out)

    def attend_own_rows(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: GpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        # What pages round is seen rounded, whether a prompt begins in this step or before.
        if plan.prefill is None or not plan.prefill.own_rows or kv_rows.dtype != key.dtype:
            return False
        # A decode's row looks at itself here, and gets its answer below.
        starts, longest = plan.batch.query_start_loc, max(plan.batch.row_counts)
        self._dense(query, key, value, starts, starts, longest, longest, scale, out)
        self._decode(query, kv_rows, plan, cos_sin_cache, scale, out)
        return True

    def _decode(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: GpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """Answer the requests that bring one row."""
        if 1 in plan.batch.row_counts:
            decode(query, plan.decode_rows, kv_rows, plan.key_index.rows, cos_sin_cache, scale, out)

    def scratch_bytes(
        self, rows: int, positions: int, heads: int, kv_heads: int, head_size: int, number_bytes: int
    ) -> int:
        return scratch_bytes(rows, positions, heads, kv_heads, head_size, number_bytes)

    def importance(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: GpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert plan.prefill is not None and plan.ranking is not None, "only a step with images ranks"
        queries = plan.prefill.queries
        return importance(query, kv_rows, plan.key_index, queries, plan.ranking, cos_sin_cache, scale)
