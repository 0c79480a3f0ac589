"""Floors of the kernels: the least they must move and compute in a scene, by the shape alone."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.kernels.scenes import Heads
from benchmarks.gpu.prediction.cost_model import (
    FLASH_QUERY_TILE,
    Gpu,
    Shape,
    asked_by_decode,
    asked_by_expansion,
    asked_by_prefill,
    causal_pairs,
    expanded_bytes,
    key_bytes,
)
from vllm_hybrid.kv.page_facts import fact_words


@dataclass(frozen=True)
class Floor:
    """The fewest bytes and the operations of one call.

    Attributes:
        bytes: to move between memory and multiprocessors, each once.
        flops: operations.
        asked: bytes that the kernel as written asks of the caches, where that is more.

    """

    bytes: float
    flops: float
    asked: float = 0.0

    def seconds(self, gpu: Gpu) -> float:
        """Nothing takes less at the data sheet's rates."""
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)


def floors(
    requests: int, live: int, patches: int, text: int, heads: Heads, decodes: bool
) -> dict[str, Floor]:
    """Floors of the kernels in a scene, bf16 pages; an entry of a list is two int32."""
    number = 2
    virtual, stored = text + patches + decodes, text + live + decodes
    row = 2 * heads.kv_heads * heads.head_size * number
    query_row = heads.heads * heads.head_size * number
    lists = requests * virtual * 8
    pair = 4 * heads.heads * heads.head_size
    shape = Shape(heads=heads.heads, kv_heads=heads.kv_heads, head_size=heads.head_size)
    key_index = Floor(requests * stored * fact_words(patches) * 4 + lists, 0)
    if decodes:
        read = requests * (stored * row + 2 * query_row) + lists
        text_rows, rows = requests * (text + decodes), requests * live
        asked = asked_by_decode(shape, requests, text_rows, rows, requests * patches)
        asked += 2 * requests * query_row
        return {"key_index": key_index, "decode": Floor(read, requests * virtual * pair, asked)}
    copies = requests * virtual * query_row
    expanded = requests * expanded_bytes(shape, virtual)
    rows = requests * stored
    # Read: the live row and position of each; written: row, position, order by row; starts of live rows.
    query_lists = requests * virtual * (8 + 8 + 12) + rows * (8 + 4)
    keys = heads.kv_heads * key_bytes(shape, virtual, patches)
    return {
        "key_index": key_index,
        "queries": Floor(query_lists, 0),
        "expand": Floor(
            rows * (row + query_row) + expanded + 2 * lists,
            0,
            requests * asked_by_expansion(shape, virtual, patches),
        ),
        "dense": Floor(
            expanded + copies,
            requests * causal_pairs(virtual, virtual) * pair,
            requests * asked_by_prefill(shape, virtual, FLASH_QUERY_TILE) + 2 * copies,
        ),
        "segments": Floor(copies + rows * query_row + requests * virtual * 4, 0),
        "importance": Floor(
            rows * row / 2 + lists + rows * 4 + requests * query_row,
            requests * virtual * pair / 2,
            # Two passes over keys and cosines and sines, without values, by every query head.
            requests * 2 * (keys - virtual * row / 2) * heads.heads / heads.kv_heads,
        ),
    }


def floor_table(requests: int, live: int, patches: int, text: int, heads: Heads) -> str:
    """Markdown: what each kernel must move and compute, and what it asks of the caches; nothing is run."""
    gpu = Gpu()
    lines = ["| kernel | must move, MB | must compute, MFLOP | floor, us | asks of caches, MB |"]
    lines.append("|---|--:|--:|--:|--:|")
    prompts = floors(requests, live, patches, text, heads, decodes=False)
    for name, floor in {**prompts, **floors(requests, live, patches, text, heads, decodes=True)}.items():
        lines.append(
            f"| {name} | {floor.bytes / 1e6:.2f} | {floor.flops / 1e6:.1f} | "
            f"{floor.seconds(gpu) * 1e6:.2f} | {max(floor.asked, floor.bytes) / 1e6:.2f} |"
        )
    return "\n".join(lines)
