"""Virtual unmerging attention on a CPU, fast.

Prefill expands queries and keys to virtual positions and leaves the rest to a dense causal kernel; the
cost of the copies is small beside the linear layers they save. Decode never expands: for one query the
score of a merged key at position j is a dot product with one row of the angle table, so a merged token is
read once however many positions it stands at. The loops that torch has no operator for are C++
(``csrc/cpu_attention.cpp``), compiled once per machine at first use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vllm_hybrid.attention.cpu_build import compile_extension
from vllm_hybrid.attention.interface import TierBatch, VirtualKeys

_NAMES = ("cpu_attention.cpp", "cpu_bf16.cpp", "cpu_bf16_decode.cpp")
_SOURCES = [Path(__file__).parent / "csrc" / name for name in _NAMES]


@functools.cache
def extension() -> Any:
    """The compiled C++ loops.

    Raises:
        RuntimeError: no C++ compiler was found.

    """
    return compile_extension(_SOURCES, "vllm_hybrid_cpu_attention")


def walk_pages(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    rows_per_block: int,
) -> VirtualKeys:
    """:func:`vllm_hybrid.attention.reference.walk_pages` in C++; same arguments, result and error."""
    return VirtualKeys(*extension().walk_pages(facts, block_table, seq_lens, patches, rows_per_block))


def write_pages(key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    """:func:`vllm_hybrid.attention.reference.write_pages` in C++; same arguments."""
    extension().write_rows(key, value, pages, slots)


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


@dataclass
class VirtualPrefill:
    """Virtual queries and keys of all requests with several queries, one request after the other.

    Queries and keys of a request ascend by position, and the queries stand at its last positions, so
    attention among them is plain causal attention aligned at the end.

    Attributes:
        rows, positions, image: of every virtual query its live row, position, and whether it is an image's.
        query_ptr: int64 [requests + 1], a request's stretch of virtual queries.
        by_row: int64 [queries], the virtual queries sorted by live row.
        segment_rows, segment_ptr: the live rows among them and each one's stretch of ``by_row``.
        key_page, key_positions, key_image: of every virtual key its page row, position, and kind.
        key_ptr: int64 [requests + 1], a request's stretch of virtual keys.
        scratch: what the dense kernel prepares once for all layers.
        memory: where the copies of all layers go, one layer after the other.

    """

    rows: torch.Tensor
    positions: torch.Tensor
    image: torch.Tensor
    query_ptr: torch.Tensor
    by_row: torch.Tensor
    segment_rows: torch.Tensor
    segment_ptr: torch.Tensor
    key_page: torch.Tensor
    key_positions: torch.Tensor
    key_image: torch.Tensor
    key_ptr: torch.Tensor
    scratch: Any = None
    memory: Workspace = field(default_factory=lambda: Workspace())


@dataclass
class CpuPlan:
    """A step sorted into decodes and prefills; each kind takes one call per layer."""

    decode_rows: torch.Tensor
    decode_requests: torch.Tensor
    prefill: VirtualPrefill | None


def plan_attention(batch: TierBatch) -> CpuPlan:
    """Sort a step's requests; done once per tier and step, used by every layer of the tier."""
    starts = batch.query_start
    single = [r for r in range(len(starts) - 1) if starts[r + 1] - starts[r] == 1]
    several = [r for r in range(len(starts) - 1) if starts[r + 1] - starts[r] > 1]
    first = torch.tensor([starts[r] for r in single], dtype=torch.int64)
    return CpuPlan(
        decode_rows=batch.plan.row_of[first],
        decode_requests=torch.tensor(single, dtype=torch.int64),
        prefill=_plan_prefill(batch, several) if several else None,
    )


def _plan_prefill(batch: TierBatch, requests: list[int]) -> VirtualPrefill:
    rows, positions, key_rows, key_positions = [], [], [], []
    for request in requests:
        stretch = slice(batch.query_start[request], batch.query_start[request + 1])
        kept = batch.plan.row_of[stretch] >= 0
        rows.append(batch.plan.row_of[stretch][kept])
        positions.append(batch.positions[stretch][kept])
        row, position = _sorted_keys(batch.keys, request)
        key_rows.append(row)
        key_positions.append(position)
    row, key_row = torch.cat(rows), torch.cat(key_rows)
    segment_rows, copies = row.unique(return_counts=True)
    return VirtualPrefill(
        rows=row,
        positions=torch.cat(positions),
        image=batch.plan.image[row] >= 0,
        query_ptr=_stretches(rows),
        by_row=row.argsort(stable=True),
        segment_rows=segment_rows,
        segment_ptr=F.pad(copies.cumsum(0), (1, 0)),
        key_page=batch.keys.row_page[key_row],
        key_positions=torch.cat(key_positions),
        key_image=batch.keys.row_image[key_row],
        key_ptr=_stretches(key_rows),
    )


def _sorted_keys(keys: VirtualKeys, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's virtual keys by ascending position: their rows and positions."""
    first, last = int(keys.row_ptr[request]), int(keys.row_ptr[request + 1])
    members = keys.member_ptr[first : last + 1]
    positions, order = keys.member_pos[int(members[0]) : int(members[-1])].sort()
    return torch.arange(first, last).repeat_interleave(members.diff())[order], positions


def _stretches(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *(p.shape[0] for p in parts)]).cumsum(0)


CausalAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VirtualPrefill, float], torch.Tensor]


def torch_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: VirtualPrefill, scale: float
) -> torch.Tensor:
    """Causal attention inside each of several sequences, aligned at their ends.

    Args:
        query: [queries, heads, head_size], sequence after sequence.
        key: [keys, kv_heads, head_size].
        value: [keys, kv_heads, head_size].
        plan: its query_ptr and key_ptr part the sequences.
        scale: factor on the scores.

    Returns:
        The shape of query, contiguous.

    """
    out = torch.empty_like(query)
    group = query.shape[1] // key.shape[1]
    queries, keys = plan.query_ptr.tolist(), plan.key_ptr.tolist()
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        q = query[q0:q1].transpose(0, 1)
        k, v = (x[k0:k1].transpose(0, 1).repeat_interleave(group, dim=0) for x in (key, value))
        square = q1 - q0 == k1 - k0
        seen = None if square else torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril((k1 - k0) - (q1 - q0))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], seen, is_causal=square, scale=scale)
        out[q0:q1] = mixed[0].transpose(0, 1)
    return out


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: TierBatch,
    plan: CpuPlan,
    angles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    causal_attention: CausalAttention = torch_causal_attention,
) -> None:
    """:func:`vllm_hybrid.attention.reference.attend`, given the plan of :func:`plan_attention`.

    ``causal_attention`` computes dense causal attention over the expanded prefills.
    """
    if plan.decode_rows.numel():
        _decode(query, plan.decode_rows, plan.decode_requests, pages, batch.keys, angles, scale, out, None)
    if plan.prefill is not None:
        _prefill(query, pages, plan.prefill, angles, scale, out, causal_attention)


def _in_bf16(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether this CPU has bf16 kernels for tensors like these."""
    return query.dtype == keys.dtype == torch.bfloat16 and extension().bf16_serves(query.shape[2])


def _prefill(
    query: torch.Tensor,
    pages: torch.Tensor,
    plan: VirtualPrefill,
    angles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    causal_attention: CausalAttention,
) -> None:
    ops = extension()
    heads, head_size = query.shape[1:]
    if _in_bf16(query, pages):
        ops.bf16_prefill(
            query,
            pages,
            plan.rows,
            plan.positions,
            plan.image,
            plan.query_ptr,
            plan.key_page,
            plan.key_positions,
            plan.key_image,
            plan.key_ptr,
            angles,
            scale,
            out,
        )
        return
    keys, kv_heads = plan.key_page.shape[0], pages.shape[1]
    q = plan.memory.get("query", query, plan.rows.shape[0], heads, head_size)
    k, v = plan.memory.get("key and value", query, 2, keys, kv_heads, head_size)
    ops.expand(query, plan.rows, plan.positions, plan.image, angles, 0, True, q)
    ops.expand(pages, plan.key_page, plan.key_positions, plan.key_image, angles, 0, True, k)
    ops.expand(pages, plan.key_page, plan.key_positions, plan.key_image, angles, head_size, False, v)
    copies = causal_attention(q, k, v, plan, scale)
    ops.segment_mean(copies, plan.by_row, plan.segment_ptr, plan.segment_rows, out)


def _decode(
    query: torch.Tensor,
    rows: torch.Tensor,
    requests: torch.Tensor,
    pages: torch.Tensor,
    keys: VirtualKeys,
    angles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    mass: torch.Tensor | None,
) -> None:
    ops = extension()
    (ops.bf16_decode if _in_bf16(query, pages) else ops.decode)(
        query,
        rows,
        requests,
        pages,
        keys.row_ptr,
        keys.row_page,
        keys.row_image,
        keys.member_ptr,
        keys.member_pos,
        angles,
        scale,
        out,
        angles.new_empty(0) if mass is None else mass,
    )


def proportional_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    log_size: torch.Tensor,
    scale: float,
) -> torch.Tensor | None:
    """Attention of every token to every token of its sequence, keys weighed by their sizes.

    Args:
        query: bf16 [tokens, heads, head_size], sequence after sequence; so are key and value.
        key: see query.
        value: see query.
        lengths: int64 [sequences], tokens of each.
        log_size: float32 [tokens], added to a key's logits (ToMe, arXiv 2210.09461, section 3.2).
        scale: factor on the scores.

    Returns:
        The shape of query; None where this CPU has no kernel for the dtype or the head size.

    """
    if not _in_bf16(query, key):
        return None
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts = F.pad(lengths.cumsum(0), (1, 0))
    extension().bf16_weighed(query, key, value, starts, log_size, scale, out)
    return out


def attention_mass(
    query: torch.Tensor, pages: torch.Tensor, batch: TierBatch, angles: torch.Tensor, scale: float
) -> torch.Tensor:
    """:func:`vllm_hybrid.attention.reference.attention_mass`, same arguments and result."""
    mass = torch.zeros(query.shape[0])
    if not batch.ranked:
        return mass
    last = torch.tensor([batch.query_start[r + 1] - 1 for r in batch.ranked])
    rows = batch.plan.row_of[last]
    image = batch.plan.image[rows] >= 0
    queries = query.new_empty(rows.shape[0], *query.shape[1:])
    extension().expand(query, rows, batch.positions[last], image, angles, 0, True, queries)
    received = torch.zeros(batch.keys.row_page.shape[0])
    order = torch.arange(rows.shape[0])
    requests = torch.tensor(batch.ranked)
    _decode(queries, order, requests, pages, batch.keys, angles, scale, torch.empty_like(queries), received)
    for request in batch.ranked:
        first, end = batch.live_stretch(request)
        stop = int(batch.keys.row_ptr[request + 1])
        mass[first:end] = received[stop - (end - first) : stop]
    return mass
