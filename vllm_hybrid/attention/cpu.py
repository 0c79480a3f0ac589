"""Virtual unmerging attention on a CPU, fast.

Prefill expands queries and keys to virtual positions and leaves the rest to a dense causal kernel; the
cost of the copies is small beside the linear layers they save. Decode never expands: for one query the
score of a merged key at position j is a dot product with one row of the cos-sin cache, so a merged token is
read once however many positions it stands at. The loops that torch has no operator for are C++
(``csrc/cpu_attention.cpp``), compiled once per machine at first use.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vllm_hybrid.attention.cpu_build import compile_extension, is_compiled
from vllm_hybrid.attention.interface import (
    AttentionOps,
    AttentionPlan,
    RankingQuery,
    TierBatch,
    VirtualKeys,
)
from vllm_hybrid.method.token_merging import PackedTokens

_NAMES = ("cpu_attention.cpp", "cpu_bf16.cpp", "cpu_bf16_decode.cpp")
_NAME = "vllm_hybrid_cpu_attention"
_SOURCES = [Path(__file__).parent / "csrc" / name for name in _NAMES]


@functools.cache
def extension() -> Any:
    """The compiled C++ loops.

    Raises:
        RuntimeError: no C++ compiler was found.

    """
    return compile_extension(_SOURCES, _NAME)


def extension_is_compiled() -> bool:
    """Whether :func:`extension` need not compile anything on this machine."""
    return is_compiled(_SOURCES, _NAME)


class Workspace:
    """Tensors by name that are made once and written again and again.

    Fresh memory costs a page fault every 4 KiB, which for copies of this size takes as long as the copy.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def get(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """A contiguous tensor of ``like``'s dtype and a shape, holding whatever was written last."""
        held = self._held.get(name)
        if held is None or held.shape != shape or held.dtype != like.dtype:
            held = self._held[name] = like.new_empty(shape)
        return held


# Called as dense(query, key, value, scale): causal attention inside each of several sequences, aligned at
# their ends. query [queries, heads, head_size], key and value [keys, kv_heads, head_size], sequence after
# sequence; the result has the shape of query.
DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

# Called as make_dense(query_start_loc, key_start_loc, memory) with int64 [sequences + 1], each one's stretch
# of queries and of keys, and where what it makes may lie from layer to layer.
MakeDenseAttention = Callable[[torch.Tensor, torch.Tensor, Workspace], DenseAttention]


@dataclass
class VirtualPrefill:
    """Virtual queries and keys of all requests with several queries, one request after the other.

    Queries and keys of a request ascend by position, and the queries stand at its last positions, so
    attention among them is plain causal attention aligned at the end.

    Attributes:
        rows, positions, image: of every virtual query its live row, position, and whether it is an image's.
        query_start_loc: int64 [requests + 1], a request's stretch of virtual queries.
        by_row: int64 [queries], the virtual queries sorted by live row.
        segment_rows, segment_ptr: the live rows among them and each one's stretch of ``by_row``.
        kv_row_index, key_positions, key_image: of every virtual key its KV row, position, and kind.
        key_start_loc: int64 [requests + 1], a request's stretch of virtual keys.
        dense: attends over the expanded copies.
        memory: where the copies of all layers go, one layer after the other.

    """

    rows: torch.Tensor
    positions: torch.Tensor
    image: torch.Tensor
    query_start_loc: torch.Tensor
    by_row: torch.Tensor
    segment_rows: torch.Tensor
    segment_ptr: torch.Tensor
    kv_row_index: torch.Tensor
    key_positions: torch.Tensor
    key_image: torch.Tensor
    key_start_loc: torch.Tensor
    dense: DenseAttention
    memory: Workspace = field(default_factory=Workspace)


@dataclass
class CpuPlan(AttentionPlan[VirtualKeys]):
    """A step sorted into decodes and prefills; each kind takes one call per layer.

    Attributes:
        decode_rows: int64 [decodes], live row of each request that brings one virtual row.
        decode_requests: int64 [decodes], those requests.
        prefill: all others; None where there are none.

    """

    decode_rows: torch.Tensor
    decode_requests: torch.Tensor
    prefill: VirtualPrefill | None


class CpuAttention(AttentionOps[VirtualKeys, CpuPlan]):
    """The operations in C++; dense attention is handed in, so that this file needs no vLLM.

    Raises:
        RuntimeError: no C++ compiler was found.

    """

    def __init__(self, make_dense: MakeDenseAttention) -> None:
        self._make_dense = make_dense
        # Compiling on the first request would keep it waiting.
        extension()

    def write_pages(
        self, key: torch.Tensor, value: torch.Tensor, kv_rows: torch.Tensor, kv_row_index: torch.Tensor
    ) -> None:
        extension().write_rows(key, value, kv_rows, kv_row_index)

    def build_key_index(
        self,
        facts: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        patches: int,
        kv_rows_per_block: int,
    ) -> VirtualKeys:
        found = extension().build_key_index(facts, block_table, seq_lens, patches, kv_rows_per_block)
        return VirtualKeys(*found)

    def plan(self, batch: TierBatch, key_index: VirtualKeys) -> CpuPlan:
        starts = batch.query_start_loc_cpu
        single = [request for request, rows in enumerate(batch.row_counts) if rows == 1]
        several = [request for request, rows in enumerate(batch.row_counts) if rows > 1]
        first = torch.tensor([starts[r] for r in single], dtype=torch.int64)
        return CpuPlan(
            batch=batch,
            key_index=key_index,
            decode_rows=batch.row_plan.row_of[first],
            decode_requests=torch.tensor(single, dtype=torch.int64),
            prefill=_plan_prefill(batch, key_index, several, self._make_dense) if several else None,
        )

    def attend(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: CpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        if plan.decode_rows.numel():
            rows, requests = plan.decode_rows, plan.decode_requests
            _decode(query, rows, requests, kv_rows, plan.key_index, cos_sin_cache, scale, out, None)
        if plan.prefill is not None:
            _prefill(query, kv_rows, plan.prefill, cos_sin_cache, scale, out)

    def importance(
        self,
        query: torch.Tensor,
        kv_rows: torch.Tensor,
        plan: CpuPlan,
        cos_sin_cache: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        batch, keys = plan.batch, plan.key_index
        importance = torch.zeros(query.shape[0])
        for asking in _rounds(batch.ranking_queries):
            received = _received(asking, query, kv_rows, batch, keys, cos_sin_cache, scale)
            for one in asking:
                first, end = batch.live_rows(one.first_row, one.row + 1)
                offset = _key_row_offset(batch, keys, one.request)
                importance[first:end] = received[first + offset : end + offset]
        return importance

    def proportional_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: PackedTokens, scale: float
    ) -> torch.Tensor:
        if not _in_bf16(query, key):
            return super().proportional_attention(query, key, value, tokens, scale)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        starts = F.pad(tokens.lengths.cumsum(0), (1, 0))
        extension().bf16_weighed(query, key, value, starts, tokens.size.log(), scale, out)
        return out


def _rounds(queries: list[RankingQuery]) -> list[list[RankingQuery]]:
    """Ranking queries sorted by how many of their request come before, so that no two of one are together."""
    rounds: list[list[RankingQuery]] = []
    asked: Counter[int] = Counter()
    for query in queries:
        if asked[query.request] == len(rounds):
            rounds.append([])
        rounds[asked[query.request]].append(query)
        asked[query.request] += 1
    return rounds


def _key_row_offset(batch: TierBatch, keys: VirtualKeys, request: int) -> int:
    """What is added to a live row of a request, numbered in the step, to find its row of the virtual keys."""
    return int(keys.row_ptr[request + 1]) - batch.live_stretch(request)[1]


def _received(
    asking: list[RankingQuery],
    query: torch.Tensor,
    kv_rows: torch.Tensor,
    batch: TierBatch,
    keys: VirtualKeys,
    cos_sin_cache: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What ranking queries of different requests give to the rows of the virtual keys, float32 [rows]."""
    virtual = torch.tensor([one.row for one in asking])
    rows = batch.row_plan.row_of[virtual]
    image = batch.row_plan.image[rows] >= 0
    queries = query.new_empty(rows.shape[0], *query.shape[1:])
    extension().expand(query, rows, batch.positions[virtual], image, cos_sin_cache, 0, True, queries)
    order = torch.arange(rows.shape[0])
    stretches = [_seen_rows(one, batch, keys) for one in asking]
    # The stretches need not touch, so each has two entries and every second place is a query's.
    seen = replace(keys, row_ptr=torch.tensor(stretches).flatten())
    received = torch.zeros(keys.kv_row_index.shape[0])
    out = torch.empty_like(queries)
    _decode(queries, order, 2 * order, kv_rows, seen, cos_sin_cache, scale, out, received)
    return received


def _seen_rows(query: RankingQuery, batch: TierBatch, keys: VirtualKeys) -> tuple[int, int]:
    """The stretch of rows of the virtual keys that a ranking query sees.

    No image lies on both sides of the query, so its keys are those of the live rows up to it.
    """
    _, end = batch.live_rows(query.first_row, query.row + 1)
    return int(keys.row_ptr[query.request]), end + _key_row_offset(batch, keys, query.request)


def _plan_prefill(
    batch: TierBatch, keys: VirtualKeys, requests: list[int], make_dense: MakeDenseAttention
) -> VirtualPrefill:
    rows, positions, key_rows, key_positions = [], [], [], []
    for request in requests:
        stretch = slice(batch.query_start_loc_cpu[request], batch.query_start_loc_cpu[request + 1])
        kept = batch.row_plan.row_of[stretch] >= 0
        rows.append(batch.row_plan.row_of[stretch][kept])
        positions.append(batch.positions[stretch][kept])
        row, position = _sorted_keys(keys, request)
        key_rows.append(row)
        key_positions.append(position)
    row, key_row = torch.cat(rows), torch.cat(key_rows)
    segment_rows, copies = row.unique(return_counts=True)
    query_start_loc, key_start_loc, memory = _stretches(rows), _stretches(key_rows), Workspace()
    return VirtualPrefill(
        rows=row,
        positions=torch.cat(positions),
        image=batch.row_plan.image[row] >= 0,
        query_start_loc=query_start_loc,
        by_row=row.argsort(stable=True),
        segment_rows=segment_rows,
        segment_ptr=F.pad(copies.cumsum(0), (1, 0)),
        kv_row_index=keys.kv_row_index[key_row],
        key_positions=torch.cat(key_positions),
        key_image=keys.is_image[key_row],
        key_start_loc=key_start_loc,
        dense=make_dense(query_start_loc, key_start_loc, memory),
        memory=memory,
    )


def _sorted_keys(keys: VirtualKeys, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's virtual keys by ascending position: their rows and positions."""
    first, last = int(keys.row_ptr[request]), int(keys.row_ptr[request + 1])
    members = keys.member_ptr[first : last + 1]
    positions, order = keys.member_pos[int(members[0]) : int(members[-1])].sort()
    return torch.arange(first, last).repeat_interleave(members.diff())[order], positions


def _stretches(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *(p.shape[0] for p in parts)]).cumsum(0)


def _in_bf16(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether this CPU has bf16 kernels for tensors like these."""
    return query.dtype == keys.dtype == torch.bfloat16 and extension().bf16_serves(query.shape[2])


def _prefill(
    query: torch.Tensor,
    kv_rows: torch.Tensor,
    plan: VirtualPrefill,
    cos_sin_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    ops = extension()
    heads, head_size = query.shape[1:]
    if _in_bf16(query, kv_rows):
        ops.bf16_prefill(
            query,
            kv_rows,
            plan.rows,
            plan.positions,
            plan.image,
            plan.query_start_loc,
            plan.kv_row_index,
            plan.key_positions,
            plan.key_image,
            plan.key_start_loc,
            cos_sin_cache,
            scale,
            out,
        )
        return
    keys, kv_heads = plan.kv_row_index.shape[0], kv_rows.shape[1]
    q = plan.memory.get("query", query, plan.rows.shape[0], heads, head_size)
    k, v = plan.memory.get("key and value", query, 2, keys, kv_heads, head_size)
    ops.expand(query, plan.rows, plan.positions, plan.image, cos_sin_cache, 0, True, q)
    key_rows = (kv_rows, plan.kv_row_index, plan.key_positions, plan.key_image, cos_sin_cache)
    ops.expand(*key_rows, 0, True, k)
    ops.expand(*key_rows, head_size, False, v)
    copies = plan.dense(q, k, v, scale)
    ops.segment_mean(copies, plan.by_row, plan.segment_ptr, plan.segment_rows, out)


def _decode(
    query: torch.Tensor,
    rows: torch.Tensor,
    requests: torch.Tensor,
    kv_rows: torch.Tensor,
    keys: VirtualKeys,
    cos_sin_cache: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    importance: torch.Tensor | None,
) -> None:
    ops = extension()
    (ops.bf16_decode if _in_bf16(query, kv_rows) else ops.decode)(
        query,
        rows,
        requests,
        kv_rows,
        keys.row_ptr,
        keys.kv_row_index,
        keys.is_image,
        keys.member_ptr,
        keys.member_pos,
        cos_sin_cache,
        scale,
        out,
        cos_sin_cache.new_empty(0) if importance is None else importance,
    )
