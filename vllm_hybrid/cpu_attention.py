"""Virtual unmerging attention on a CPU, fast.

Prefill expands queries and keys to virtual positions and lets torch's flash attention do the rest; the
cost of the copies is small beside the linear layers they save. Decode never expands: for one query the
score of a merged key at position j is a dot product with one row of the angle table, so a merged token is
read once however many positions it stands at. The loops that torch has no operator for are C++
(``csrc/cpu_attention.cpp``), compiled once per machine at first use.
"""

from __future__ import annotations

import functools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .planning import VirtualKeys
from .unmerging import TierBatch

_SOURCE = Path(__file__).parent / "csrc" / "cpu_attention.cpp"


@functools.cache
def extension() -> Any:
    """The compiled C++ loops.

    Raises:
        RuntimeError: no C++ compiler was found.

    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(
            f"the C++ compiler {compiler!r} was not found, and CPU attention needs it; install g++ or set CXX"
        )
    isa = pick_vec_isa()
    flags = ["-O3", "-fopenmp", "-fno-math-errno", *isa.build_arch_flags().split()]
    flags += [f"-D{macro}" for macro in isa.build_macro()]
    # ninja is installed beside the interpreter, which need not be on PATH.
    with _on_path(str(Path(sys.executable).parent)):
        return cpp_extension.load(
            name="vllm_hybrid_cpu_attention", sources=[str(_SOURCE)], extra_cflags=flags, verbose=False
        )


class _on_path:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        import os

        self.before = os.environ.get("PATH", "")
        os.environ["PATH"] = f"{self.folder}{os.pathsep}{self.before}"

    def __exit__(self, *_: object) -> None:
        import os

        os.environ["PATH"] = self.before


def walk_pages(
    facts: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    patches: int,
    rows_per_block: int,
) -> VirtualKeys:
    """:func:`vllm_hybrid.planning.walk_pages` in C++; same arguments, result and error."""
    return VirtualKeys(*extension().walk_pages(facts, block_table, seq_lens, patches, rows_per_block))


@dataclass
class _Prefill:
    """One request with several queries: its virtual queries and keys, both ascending by position."""

    rows: torch.Tensor
    positions: torch.Tensor
    image: torch.Tensor
    first_row: int
    by_row: torch.Tensor
    row_ptr: torch.Tensor
    key_page: torch.Tensor
    key_positions: torch.Tensor
    key_image: torch.Tensor
    seen: torch.Tensor | None


@dataclass
class CpuPlan:
    """A step sorted into decodes, which share one kernel call, and prefills, one call each."""

    decode_rows: torch.Tensor
    decode_requests: torch.Tensor
    prefills: list[_Prefill]


def plan_attention(batch: TierBatch) -> CpuPlan:
    """Sort a step's requests; done once per tier and step, used by every layer of the tier."""
    starts = batch.query_start
    single = [r for r in range(len(starts) - 1) if starts[r + 1] - starts[r] == 1]
    several = [r for r in range(len(starts) - 1) if starts[r + 1] - starts[r] > 1]
    first = torch.tensor([starts[r] for r in single], dtype=torch.int64)
    return CpuPlan(
        decode_rows=batch.plan.row_of[first],
        decode_requests=torch.tensor(single, dtype=torch.int64),
        prefills=[_plan_prefill(batch, r) for r in several],
    )


def _plan_prefill(batch: TierBatch, request: int) -> _Prefill:
    stretch = slice(batch.query_start[request], batch.query_start[request + 1])
    rows, positions = batch.plan.row_of[stretch], batch.positions[stretch]
    kept = rows >= 0
    if not bool(kept.all()):
        rows, positions = rows[kept], positions[kept]
    keys = batch.keys
    row0, row1 = int(keys.row_ptr[request]), int(keys.row_ptr[request + 1])
    sizes = keys.member_ptr[row0 + 1 : row1 + 1] - keys.member_ptr[row0:row1]
    unsorted = keys.member_pos[int(keys.member_ptr[row0]) : int(keys.member_ptr[row1])]
    key_positions, order = unsorted.sort()
    key_row = torch.arange(row0, row1).repeat_interleave(sizes)[order]
    first, last = batch.live_stretch(request)
    copies = torch.bincount(rows - first, minlength=last - first)
    # As many queries as keys: nothing was computed before, both lists are the same positions.
    square = positions.shape[0] == key_positions.shape[0]
    return _Prefill(
        rows=rows,
        positions=positions,
        image=batch.plan.image[rows] >= 0,
        first_row=first,
        by_row=(rows - first).argsort(stable=True),
        row_ptr=F.pad(copies.cumsum(0), (1, 0)),
        key_page=keys.row_page[key_row],
        key_positions=key_positions,
        key_image=keys.row_image[key_row],
        seen=None if square else key_positions <= positions[:, None],
    )


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    batch: TierBatch,
    plan: CpuPlan,
    angles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """:func:`vllm_hybrid.unmerging.attend`, given the plan of :func:`plan_attention`."""
    if plan.decode_rows.numel():
        _decode(query, plan.decode_rows, plan.decode_requests, pages, batch.keys, angles, scale, out, None)
    for prefill in plan.prefills:
        _prefill(query, pages, prefill, angles, scale, out)


def _prefill(
    query: torch.Tensor, pages: torch.Tensor, plan: _Prefill, angles: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    ops = extension()
    heads, head_size = query.shape[1:]
    kv_heads = pages.shape[1]
    q = query.new_empty(heads, plan.rows.shape[0], head_size)
    k = query.new_empty(kv_heads, plan.key_page.shape[0], head_size)
    v = torch.empty_like(k)
    ops.expand(query, plan.rows, plan.positions, plan.image, angles, 0, True, q)
    ops.expand(pages, plan.key_page, plan.key_positions, plan.key_image, angles, 0, True, k)
    ops.expand(pages, plan.key_page, plan.key_positions, plan.key_image, angles, head_size, False, v)
    if kv_heads != heads:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v))
    copies = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=plan.seen, is_causal=plan.seen is None, scale=scale
    )[0]
    ops.segment_mean(copies, plan.by_row, plan.row_ptr, out, plan.first_row)


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
    extension().decode(
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


def attention_mass(
    query: torch.Tensor, pages: torch.Tensor, batch: TierBatch, angles: torch.Tensor, scale: float
) -> torch.Tensor:
    """:func:`vllm_hybrid.unmerging.attention_mass`, same arguments and result."""
    mass = torch.zeros(query.shape[0])
    if not batch.ranked:
        return mass
    last = torch.tensor([batch.query_start[r + 1] - 1 for r in batch.ranked])
    rows = batch.plan.row_of[last]
    image = batch.plan.image[rows] >= 0
    turned = query.new_empty(query.shape[1], rows.shape[0], query.shape[2])
    extension().expand(query, rows, batch.positions[last], image, angles, 0, True, turned)
    received = torch.zeros(batch.keys.row_page.shape[0])
    queries = turned.transpose(0, 1)
    order = torch.arange(rows.shape[0])
    requests = torch.tensor(batch.ranked)
    _decode(queries, order, requests, pages, batch.keys, angles, scale, torch.empty_like(queries), received)
    for request in batch.ranked:
        first, end = batch.live_stretch(request)
        stop = int(batch.keys.row_ptr[request + 1])
        mass[first:end] = received[stop - (end - first) : stop]
    return mass
