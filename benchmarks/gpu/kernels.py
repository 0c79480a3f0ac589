"""Times of the Triton kernels against what bandwidth and arithmetic allow, after a check of their results.

    python benchmarks/gpu/kernels.py --out kernels.json            # 7B shape, on a GPU
    python benchmarks/gpu/kernels.py --tiny --out kernels.json     # toy shape, Triton's interpreter on a CPU
    python benchmarks/gpu/kernels.py --floors                      # the floors alone: nothing is run

A scene is a batch of requests with one image each. Every kernel's result is first compared with the plain
torch implementation on the CPU in float32; then it is timed with CUDA events, caches flushed in between.
The floor of a kernel is the longer of two times: the fewest bytes it must move (every stored row read once,
however many positions it stands at) over the bandwidth, and its operations over the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    # Has to be said before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from benchmarks.gpu.cost_model import (  # noqa: E402
    HYBRID_QUERY_TILE,
    Gpu,
    Shape,
    asked_by_decode,
    asked_by_prefill,
    causal_pairs,
)
from vllm_hybrid import planning, unmerging  # noqa: E402
from vllm_hybrid.pages import fact_words, new_page_facts  # noqa: E402
from vllm_hybrid.planning import RowPlan, StepImages  # noqa: E402
from vllm_hybrid.unmerging import TierBatch, rotation_angles  # noqa: E402

BLOCK_SIZE = 16
TEXT_BEFORE = 5


@dataclass(frozen=True)
class Heads:
    """Shape of one attention layer."""

    heads: int
    kv_heads: int
    head_size: int


@dataclass
class Scene:
    """A step of requests with one image each: the same facts for the kernels and for the reference.

    Attributes:
        plan: its live rows.
        images: its images.
        positions: int64 [N].
        query_start: a request's stretch of virtual rows, on the host.
        facts: page facts of all requests, this step's rows included.
        block_table: int32 [requests, blocks].
        seq_lens: int32 [requests].
        page_slots: int64 [R], page row of each live row of the step.
        pages: [rows, kv_heads, 2 * head_size].
        query: [R, heads, head_size], text rows rotated, image rows not.
        angles: float32 [positions, head_size].

    """

    plan: RowPlan
    images: StepImages | None
    positions: torch.Tensor
    query_start: list[int]
    facts: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    page_slots: torch.Tensor
    pages: torch.Tensor
    query: torch.Tensor
    angles: torch.Tensor
    patches: int
    scale: float

    def batch(self, keys: Any) -> TierBatch:
        """The step as an implementation takes it, given the key lists that the same one read."""
        ranked = list(range(len(self.query_start) - 1)) if self.images is not None else []
        device = self.positions.device
        return TierBatch(
            plan=self.plan,
            positions=self.positions,
            query_start=self.query_start,
            query_ptr=torch.tensor(self.query_start, dtype=torch.int32, device=device),
            page_slots=self.page_slots,
            keys=keys,
            ranked=ranked,
        )

    def to(self, device: str, dtype: torch.dtype) -> Scene:
        """A copy on a device, its floating-point pages and queries in a dtype."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value.to(device, dtype) if name in ("pages", "query") else value.to(device)
            elif isinstance(value, RowPlan):
                value = RowPlan(**{k: v.to(device) for k, v in vars(value).items()})
            elif isinstance(value, StepImages):
                first, owner = value.first_row.to(device), value.owner.to(device)
                value = StepImages(first, owner, value.first_rows, value.counts)
            moved[name] = value
        return Scene(**moved)


def random_owner(patches: int, live: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [patches]: every live token holds at least one patch, the others at random."""
    owner = torch.randint(live, (patches,), generator=generator)
    owner[torch.randperm(patches, generator=generator)[:live]] = torch.arange(live)
    return owner


def make_scene(
    requests: int, live: int, patches: int, text: int, heads: Heads, decodes: bool, seed: int = 0
) -> Scene:
    """A step of prompts, or of decodes whose prompts are in the pages.

    Args:
        requests: how many, with one image each.
        live: live tokens of an image.
        patches: patches of an image.
        text: text tokens of a prompt, TEXT_BEFORE of them before the image.
        heads: shape of the layer.
        decodes: whether the step decodes one token of each request instead of prefilling it.
        seed: of the random numbers.

    Returns:
        The scene on the CPU in float32.

    """
    draw = torch.Generator().manual_seed(seed)
    prompt = text + patches
    owner = torch.stack([random_owner(patches, live, draw) for _ in range(requests)])
    first_rows = [r * prompt + TEXT_BEFORE for r in range(requests)]
    images = StepImages(torch.tensor(first_rows), owner, first_rows, [live] * requests)
    plan = planning.plan_live_rows(requests * prompt, images)
    positions = torch.arange(prompt).repeat(requests)
    length = prompt + decodes
    blocks = -(-length // BLOCK_SIZE)
    # Block 0 is vLLM's null block.
    table = 1 + torch.arange(requests * blocks, dtype=torch.int32).view(requests, blocks)
    facts = new_page_facts(1 + requests * blocks, BLOCK_SIZE, patches, torch.device("cpu"))
    request = torch.arange(requests).repeat_interleave(prompt)
    slots = (1 + request * blocks) * BLOCK_SIZE + positions
    stored = slots[plan.stored_at]
    facts.view(-1, fact_words(patches))[stored] = planning.plan_facts(plan, images, positions)
    pages = torch.randn(
        (1 + requests * blocks) * BLOCK_SIZE, heads.kv_heads, 2 * heads.head_size, generator=draw
    )
    query_start = [r * prompt for r in range(requests + 1)]
    step_images: StepImages | None = images
    if decodes:
        rows = torch.arange(requests)
        plan = RowPlan(rows=rows, row_of=rows, stored_at=rows, image=torch.full_like(rows, -1))
        positions = torch.full((requests,), prompt)
        stored = (1 + rows * blocks) * BLOCK_SIZE + prompt
        query_start, step_images = list(range(requests + 1)), None
    exponent = torch.arange(0, heads.head_size, 2) / heads.head_size
    return Scene(
        plan=plan,
        images=step_images,
        positions=positions,
        query_start=query_start,
        facts=facts,
        block_table=table,
        seq_lens=torch.full((requests,), length, dtype=torch.int32),
        page_slots=stored,
        pages=pages,
        query=torch.randn(plan.rows.shape[0], heads.heads, heads.head_size, generator=draw),
        angles=rotation_angles(10000.0**-exponent, length + 1),
        patches=patches,
        scale=heads.head_size**-0.5,
    )


def reference_results(scene: Scene) -> dict[str, torch.Tensor]:
    """What attention and, for prompts, the ranking mass must be; float32 on the CPU."""
    keys = planning.walk_pages(scene.facts, scene.block_table, scene.seq_lens, scene.patches, BLOCK_SIZE)
    batch = scene.batch(keys)
    out = torch.zeros_like(scene.query)
    unmerging.attend(scene.query, scene.pages, batch, scene.angles, scene.scale, out)
    results = {"attend": out}
    if batch.ranked:
        results["mass"] = unmerging.attention_mass(scene.query, scene.pages, batch, scene.angles, scene.scale)
    return results


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
    walk = Floor(requests * stored * fact_words(patches) * 4 + lists, 0)
    if decodes:
        read = requests * (stored * row + 2 * query_row) + lists
        asked = requests * asked_by_decode(shape, virtual, patches) + heads.kv_heads * lists
        return {"walk": walk, "decode": Floor(read, requests * virtual * pair, asked)}
    copies = requests * virtual * query_row
    rows = requests * stored
    # Read: the live row and position of each; written: row, turn, order by row; the starts of each live row.
    query_lists = requests * virtual * (8 + 8 + 12) + rows * (8 + 4)
    keys = asked_by_decode(shape, virtual, patches)
    return {
        "walk": walk,
        "queries": Floor(query_lists, 0),
        "prefill": Floor(
            rows * (row + query_row) + copies + 2 * lists,
            requests * causal_pairs(virtual, virtual) * pair,
            requests * asked_by_prefill(shape, virtual, patches / virtual, HYBRID_QUERY_TILE) + 2 * copies,
        ),
        "segments": Floor(copies + rows * query_row + requests * virtual * 4, 0),
        "mass": Floor(
            rows * row / 2 + lists + rows * 4 + requests * query_row,
            requests * virtual * pair / 2,
            # Two passes over keys and angles, without values, by every query head.
            requests * 2 * (keys - virtual * row / 2) * heads.heads / heads.kv_heads,
        ),
    }


Call = Callable[[], Any]


def kernel_calls(scene: Scene) -> tuple[dict[str, Call], dict[str, torch.Tensor]]:
    """The kernels on a scene, as the attention layer calls them.

    Returns:
        A call for each kernel, and the buffers with their results after all have run once.

    """
    from vllm_hybrid import gpu_attention
    from vllm_hybrid.kernels.decode import decode
    from vllm_hybrid.kernels.lists import query_lists
    from vllm_hybrid.kernels.mass import attention_mass
    from vllm_hybrid.kernels.prefill import prefill
    from vllm_hybrid.kernels.segments import segment_mean
    from vllm_hybrid.kernels.walk import walk_pages

    facts, table, lens = scene.facts, scene.block_table, scene.seq_lens
    keys = gpu_attention.walk_pages(facts, table, lens, scene.patches, BLOCK_SIZE)
    batch = scene.batch(keys)
    plan = gpu_attention.plan_attention(batch)
    query, pages, angles, scale = scene.query, scene.pages, scene.angles, scene.scale
    # Poisoned, so that a row nobody writes shows.
    out = torch.full_like(query, float("nan"))
    gpu_attention.attend(query, pages, batch, plan, angles, scale, out)
    results = {"attend": out.clone()}
    calls: dict[str, Call] = {"walk": lambda: walk_pages(facts, table, lens, scene.patches, BLOCK_SIZE, keys)}
    if plan.queries is None or plan.ranked is None:
        calls["decode"] = lambda: decode(query, plan.decode_rows, pages, keys, angles, scale, out)
        return calls, results
    queries, ranked, skip = plan.queries, plan.ranked, plan.decode_rows
    copies = query.new_empty(queries.row.shape[0], *query.shape[1:])
    results["mass"] = gpu_attention.attention_mass(query, pages, batch, plan, angles, scale)
    return calls | {
        "queries": lambda: query_lists(scene.plan.row_of, scene.positions, scene.plan.image, batch.query_ptr),
        "prefill": lambda: prefill(query, pages, keys, queries, skip, angles, scale, copies),
        "segments": lambda: segment_mean(copies, queries.by_row, queries.row_start, out),
        "mass": lambda: attention_mass(query, pages, keys, queries, ranked, angles, scale),
    }, results


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """||got - wanted|| / ||wanted||; infinite where a number is missing."""
    difference = got.float().cpu() - wanted
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.norm() / wanted.norm())


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


# Error allowed against float32 on the CPU: of bf16 pages, queries and results, and of float32 ones.
ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def measure(
    requests: int, live: int, decodes: bool, heads: Heads, patches: int, text: int, cuda: bool, repeats: int
) -> list[dict[str, Any]]:
    """Check and time the kernels on one scene.

    Raises:
        RuntimeError: a result is wrong.

    """
    dtype = torch.bfloat16 if cuda else torch.float32
    device = "cuda" if cuda else "cpu"
    # The reference takes a while: it sees the first requests only.
    small = make_scene(min(requests, 2), live, patches, text, heads, decodes)
    # Both sides start from the numbers that bf16 holds.
    small = small.to("cpu", dtype).to("cpu", torch.float32)
    wanted = reference_results(small)
    _, got = kernel_calls(small.to(device, dtype))
    errors = {name: error(got[name], wanted[name]) for name in wanted}
    for name, value in errors.items():
        if value > ALLOWED[dtype]:
            what = f"{requests} requests, {live} live tokens, {'decode' if decodes else 'prefill'}"
            raise RuntimeError(f"{name} is off by {value:.2g} with {what}; nothing was timed")
    calls, _ = kernel_calls(make_scene(requests, live, patches, text, heads, decodes).to(device, dtype))
    least = floors(requests, live, patches, text, heads, decodes)
    gpu = Gpu()
    return [
        {
            "kernel": name,
            "requests": requests,
            "live": live,
            "decodes": decodes,
            "seconds": median_seconds(call, cuda, repeats),
            "floor_s": least[name].seconds(gpu),
            "floor_bytes": least[name].bytes,
            "floor_flops": least[name].flops,
            "asked_bytes": max(least[name].asked, least[name].bytes),
            "errors": errors,
        }
        for name, call in calls.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| kernel | requests | live | time, us | floor, us | times floor |", "|---|---|---|---|---|---|"]
    for row in rows:
        step = " (decode step)" if row["kernel"] == "walk" and row["decodes"] else ""
        lines.append(
            f"| {row['kernel']}{step} | {row['requests']} | {row['live']} | {row['seconds'] * 1e6:.1f} | "
            f"{row['floor_s'] * 1e6:.2f} | {row['seconds'] / row['floor_s']:.1f} |"
        )
    return "\n".join(lines)


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--floors", action="store_true", help="print the floors and run nothing")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if args.floors:
        print(floor_table(1, 90, 576, 60, Heads(32, 32, 128)))
        return 0
    cuda = not args.tiny
    if cuda and not torch.cuda.is_available():
        print("there is no CUDA device; use a GPU host, or --tiny for a toy run on a CPU")
        return 1
    if args.tiny:
        heads, patches, text = Heads(2, 2, 32), 24, 9
        scenes = [(2, 7, False), (2, 7, True)]
    else:
        heads, patches, text = Heads(32, 32, 128), 576, 60
        scenes = [(r, n, False) for r in (1, 16) for n in (90, 195, 394)]
        scenes += [(r, n, True) for r in (1, 16, 64) for n in (90, 195, 394)]
    import triton

    content: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if cuda else "cpu, Triton's interpreter",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "heads": vars(heads),
        "kernels": [],
    }
    if cuda:
        content["ceilings"] = ceilings()
    for requests, live, decodes in scenes:
        try:
            content["kernels"] += measure(requests, live, decodes, heads, patches, text, cuda, args.repeats)
        except RuntimeError as failure:
            print(failure)
            return 1
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    args.out.write_text(json.dumps(content | {"complete": True}, indent=1) + "\n")
    print(table(content["kernels"]))
    if args.tiny:
        print("(interpreted on a CPU: the times mean nothing)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
