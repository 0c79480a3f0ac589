"""The kernels of a scene, each as the attention layer or the tower calls it, and what they cost and take."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu.kernels.scenes import KV_ROWS_PER_BLOCK, Scene
from benchmarks.gpu.kernels.tower_scenes import TowerScene

Call = Callable[[], Any]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN, or the largest integer.

    So does everything the kernels are handed to write: answers, copies of queries, parts, key lists.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def results(scene: Scene) -> dict[str, torch.Tensor]:
    """What the kernels make of a scene: ``attend`` and, where the step ranks, ``importance``."""
    return scene.results(_attention(scene), torch.empty_like(scene.query))


def _attention(scene: Scene) -> Any:
    """The operations as a server of the scene's dtype and heads has them."""
    from vllm_hybrid.attention.dense import select_dense_attention
    from vllm_hybrid.attention.gpu import GpuAttention

    return GpuAttention(select_dense_attention(scene.query.dtype, scene.query.shape[2]))


def kernel_calls(scene: Scene) -> dict[str, Call]:
    """A call for each kernel of a scene."""
    from vllm_hybrid.attention.dense import select_dense_attention
    from vllm_hybrid.attention.triton_kernels.decode import decode
    from vllm_hybrid.attention.triton_kernels.expand import expand_keys, expand_queries
    from vllm_hybrid.attention.triton_kernels.importance import importance
    from vllm_hybrid.attention.triton_kernels.key_index import build_key_index, index_decodes
    from vllm_hybrid.attention.triton_kernels.lists import query_lists
    from vllm_hybrid.attention.triton_kernels.segments import segment_mean

    pages = (scene.facts, scene.block_table, scene.seq_lens, scene.patches, KV_ROWS_PER_BLOCK)
    plan = scene.plan(_attention(scene))
    keys = plan.key_index
    query, kv_rows, cos_sin_cache, scale = scene.query, scene.kv_rows, scene.cos_sin_cache, scene.scale
    out = torch.empty_like(query)
    if plan.prefill is None:
        foreign = torch.zeros(scene.seq_lens.shape[0], dtype=torch.bool, device=query.device)
        return {
            "key_index": lambda: index_decodes(*pages, keys, scene.slots, foreign),
            "decode": lambda: decode(query, None, kv_rows, keys.rows, cos_sin_cache, scale, out),
        }
    batch, queries, ranking = plan.batch, plan.prefill.queries, plan.ranking
    (group,) = plan.prefill.groups
    expanded = query.new_empty(queries.row.shape[0], *query.shape[1:])
    copies = torch.empty_like(expanded)
    key, value = query.new_empty(2, group.key_bound, *kv_rows.shape[1:-1], query.shape[2])
    rows = (batch.row_plan.row_of, batch.positions, batch.row_plan.image, batch.query_start_loc)
    sequences = (group.query_start, group.key_start, group.longest_query, group.longest_key)
    dense = select_dense_attention(query.dtype, query.shape[2])

    def expand() -> None:
        expand_queries(query, queries, cos_sin_cache, expanded)
        requests = slice(group.first, group.end)
        expand_keys(kv_rows, keys, requests, group.key_start, group.longest_key, cos_sin_cache, key, value)

    expand()
    return {
        "key_index": lambda: build_key_index(*pages, keys),
        "queries": lambda: query_lists(*rows),
        "expand": expand,
        "dense": lambda: dense(expanded, key, value, *sequences, scale, copies),
        "segments": lambda: segment_mean(copies, queries.by_row, queries.row_start, out),
        "importance": lambda: importance(query, kv_rows, keys, queries, ranking, cos_sin_cache, scale),
    }


def tower_calls(scene: TowerScene) -> dict[str, Call]:
    """A call for each kernel of a layer of the tower.

    Args:
        scene: of :meth:`TowerScene.to`, with one merge.

    """
    from vllm_hybrid.attention.gpu_tower import GpuTower
    from vllm_hybrid.attention.triton_kernels.tower_merge import join_rows, plan_merge

    tower, tokens, (layer,) = GpuTower(), scene.tokens(), scene.layers
    query, key, value = layer.heads(scene.shape.heads.head_size)
    metric, rows = tower.metric(key), scene.shape.rows[1]
    deciding = (metric, layer.threshold, tokens.starts, tokens.bounds[1], tokens.index[0], rows)
    plan, total = plan_merge(*deciding), tokens.bounds[1, scene.shape.images :]
    return {
        "tower_attention": lambda: tower.attend(query, key, value, tokens, scene.scale),
        "metric": lambda: tower.metric(key),
        "match and plan": lambda: plan_merge(*deciding),
        "join": lambda: join_rows(tokens.hidden, layer.added, tokens.size, plan, total),
    }


def owners_call(lengths: Sequence[Sequence[int]], patches: int, device: str) -> Call:
    """A call of what follows the tokens' numbers through all merges, which are random numbers here.

    Args:
        lengths: tokens of every image before the first layer and behind each.
        patches: patches of an image.
        device: where.

    """
    from vllm_hybrid.attention.triton_kernels.tower_merge import owners

    images, rows = len(lengths[0]), sum(lengths[0])
    bounds = torch.zeros(len(lengths), images + 3, dtype=torch.int32)
    index = torch.zeros(len(lengths) - 1, rows, dtype=torch.int32)
    for stage, own in enumerate(lengths):
        bounds[stage, 1 : images + 1] = torch.tensor(own).cumsum(0)
    for numbers, before, after in zip(index, lengths, lengths[1:], strict=False):
        one_image = [torch.randint(left, (length,)) for length, left in zip(before, after, strict=True)]
        numbers[: sum(before)] = torch.cat(one_image)
    bounds, index = bounds.to(device), index.to(device)
    return lambda: owners(bounds, index, images, patches)


def median_seconds(call: Call, cuda: bool, repeats: int) -> float:
    """Median time of a call, caches flushed before each."""
    if not cuda:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def ceilings(repeats: int = 10) -> dict[str, float]:
    """Bytes/s that a large copy reads and writes here, and operations/s of a large bf16 product."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copying = median_seconds(lambda: target.copy_(source), True, repeats)
    product = median_seconds(lambda: a @ b, True, repeats)
    return {"bytes_per_s": 2 * source.numel() / copying, "flops_per_s": 2 * 8192**3 / product}
