"""Floors of the kernels: the least they must move and compute in a scene, by the shape alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.kernels.plan import TimedTower
from benchmarks.gpu.kernels.scenes import Heads
from benchmarks.gpu.kernels.tower_scenes import TowerShape
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
        peak: operations per second of the units that may do them; None: of tensor cores.

    """

    bytes: float
    flops: float
    asked: float = 0.0
    peak: float | None = None

    def seconds(self, gpu: Gpu) -> float:
        """Nothing takes less at the data sheet's rates."""
        return max(self.bytes / gpu.bandwidth, self.flops / (self.peak or gpu.flops))


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


# Float32 on the ordinary cores, which is what decides about merges: data sheet, H100 SXM.
FLOAT32_FLOPS = 67e12
# Of attention/triton_kernels/tower_attention.py and tower_merge.py: queries of a tile; A tokens of a tile of
# the match; tokens of one of the plan; channels of a program of the means.
TOWER_QUERIES, MATCHED, PLANNED, JOINED = 64, 32, 64, 512


def tower_floors(shape: TowerShape) -> dict[str, Floor]:
    """Floors of the kernels of a layer of the tower in bf16; none of them has to touch padding.

    Args:
        shape: of a scene with one merge.

    """
    number, index = 2, 4
    before, after = shape.lengths
    tokens, left = sum(before), sum(after)
    row, metric_row = shape.heads.width * number, shape.heads.head_size * 4
    odd, even = [n // 2 for n in before], [(n + 1) // 2 for n in before]
    seen = sum(-(-n // TOWER_QUERIES) * n for n in before)
    # A tile of the match asks for its own rows again with each further 32 B tokens.
    matched = sum(-(-a // MATCHED) * (b + -(-b // MATCHED) * MATCHED) for a, b in zip(even, odd, strict=True))
    planned = sum(-(-n // PLANNED) * a for n, a in zip(before, even, strict=True))
    lists = tokens * 2 * index + left * 2 * index
    joined = 2 * tokens * row + left * row + tokens * (4 + index) + left * (2 * index + 4)
    programs = -(-shape.heads.width // JOINED)
    return {
        "tower_attention": Floor(
            4 * tokens * row + tokens * 4,
            sum(4 * n * n for n in before) * shape.heads.width,
            (shape.rows[0] + tokens) * row + seen * (2 * row + shape.heads.heads * 4),
        ),
        "metric": Floor(
            tokens * (row + metric_row),
            tokens * shape.heads.width,
            shape.rows[0] * (row + metric_row),
            FLOAT32_FLOPS,
        ),
        "match and plan": Floor(
            tokens * metric_row + lists,
            sum(2 * a * b for a, b in zip(even, odd, strict=True)) * shape.heads.head_size,
            matched * metric_row + planned * index + lists,
            FLOAT32_FLOPS,
        ),
        "join": Floor(
            joined,
            3 * tokens * shape.heads.width,
            # Who belongs together is read twice by the programs of each row.
            2 * tokens * row + shape.rows[1] * row + programs * (2 * tokens * (4 + index) + left * 2 * index),
            FLOAT32_FLOPS,
        ),
    }


def owners_floor(lengths: Sequence[Sequence[int]], patches: int) -> Floor:
    """Floor of following all patches through the merges of a batch.

    Args:
        lengths: tokens of every image before the first layer and behind each.
        patches: patches of an image.

    """
    read = sum(sum(stage) for stage in lengths[:-1]) * 4
    images, merges = len(lengths[0]), len(lengths) - 1
    written = images * patches * 8
    return Floor(read + written, 0, images * patches * merges * 4 + written)


def floor_table(requests: int, live: int, patches: int, text: int, heads: Heads) -> str:
    """Markdown: what each kernel must move and compute, and what it asks of the caches; nothing is run."""
    prompts = floors(requests, live, patches, text, heads, decodes=False)
    decodes = floors(requests, live, patches, text, heads, decodes=True)
    return "\n".join([_HEAD, _RULE, *(_row(name, floor) for name, floor in {**prompts, **decodes}.items())])


def tower_floor_table(timed: Iterable[TimedTower]) -> str:
    """Markdown: the same of the kernels of some layers of the tower, and of the end of a batch."""
    lines = [f"| pictures | layer | tokens of each {_HEAD}", f"|--:|--:|--:{_RULE}"]
    for one in timed:
        found = tower_floors(one.shape)
        if one.layer == one.layers:
            found["owners"] = owners_floor(one.lengths, one.patches)
        place = f"| {one.images} | {one.layer} | {one.tokens} "
        lines += [place + _row(name, floor) for name, floor in found.items()]
    return "\n".join(lines)


_HEAD = "| kernel | must move, MB | must compute, MFLOP | floor, us | asks of caches, MB |"
_RULE = "|---|--:|--:|--:|--:|"


def _row(name: str, floor: Floor) -> str:
    return (
        f"| {name} | {floor.bytes / 1e6:.2f} | {floor.flops / 1e6:.1f} | "
        f"{floor.seconds(Gpu()) * 1e6:.2f} | {max(floor.asked, floor.bytes) / 1e6:.2f} |"
    )
