"""Compiles every kernel for GPUs that are not there and says what the code needs: registers, spills, memory.

    python -m tests.support.kernel_builds            # a table of Markdown, as in docs/kernels.md
    python -m tests.support.kernel_builds --json     # one object per compiled variant
    python -m tests.support.kernel_builds --brief    # float16 for one architecture alone
    python -m tests.support.kernel_builds --loops decode     # instructions in the loops of a kernel

The functions that the attention layer calls run as they are, on small CPU tensors with the heads of a real
model; only the last step differs: a launch compiles, for the architecture asked for, and does not run. So
dtypes, constants, warps and what Triton derives from arguments (alignment, ones) are those of a real launch.
What the code needs is read from ptxas, run by Triton with its own options.

Triton decides on import whether it interprets kernels, so this is a program of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import ROOT
from vllm_hybrid.attention.interface import DecodeStep, RankingQuery, TierBatch
from vllm_hybrid.kv.page_facts import fact_words
from vllm_hybrid.method.device_tokens import DeviceTokens
from vllm_hybrid.method.row_plan import plan_text_rows

KERNELS = ROOT / "vllm_hybrid" / "attention" / "triton_kernels"
ARCHITECTURES = (80, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16)
# With Triton 3.9.0 no kernel in float16 needs more than four registers more than in bfloat16.
FULL = dict.fromkeys(ARCHITECTURES, DTYPES)
BRIEF = {sm: dtypes if sm == 90 else dtypes[:1] for sm, dtypes in FULL.items()}
# Pages in FP8, with queries in the first dtype, where hardware converts them.
FP8, FP8_ARCHITECTURES = torch.float8_e4m3fn, (90, 100, 120)
PATCHES = 576
BLOCK_SIZE = 16
# Positions of the longest request a block table has room for, and of the cos_sin_cache.
LONGEST = 4096

# Of one multiprocessor, from NVIDIA's CUDA programming guide, table of compute capabilities.
REGISTERS = 65536
SHARED_KIB = {80: 164, 90: 228, 100: 228, 120: 100}
WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
# Matrix instructions of the disassembly, by their first part.
MATRIX = ("UTCHMMA", "HGMMA", "HMMA")
# Registers are handed out per warp in units of 256; shared memory of a block has 1 KiB on top.
_REGISTER_UNIT = 256
_RESERVED_SHARED = 1024


@dataclass(frozen=True)
class Heads:
    """Heads of an attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_size: int


# The tower of LLaVA-1.5, CLIP ViT-L at 336 pixels.
TOWER = Heads("tower of LLaVA-1.5", 16, 16, 64)

SHAPES = (Heads("LLaVA-1.5-7B", 32, 32, 128), Heads("grouped, 32 over 8", 32, 8, 128))


@dataclass(frozen=True)
class Build:
    """What the code of one compiled variant needs.

    Attributes:
        kernel: name of the function.
        architecture: compute capability, times 10.
        heads: name of the shape.
        dtype: of pages, and of queries but for pages in FP8.
        warps: of a block.
        registers: per thread.
        spilled: bytes a thread writes to and reads from memory because registers run out.
        stack: bytes of a thread's stack frame.
        shared: bytes of shared memory of a block.
        products: instruction of the disassembly that multiplies matrices, "" where none does.
        copies: asynchronous copies to shared memory in the disassembly, as a count.
        widest_load: most bytes that one load or copy from global memory brings a thread, likewise.

    """

    kernel: str
    architecture: int
    heads: str
    dtype: str
    warps: int
    registers: int
    spilled: int
    stack: int
    shared: int
    products: str
    copies: int
    widest_load: int

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        a_warp = math.ceil(self.registers * 32 / _REGISTER_UNIT) * _REGISTER_UNIT
        by_shared = SHARED_KIB[self.architecture] * 1024 // (self.shared + _RESERVED_SHARED)
        return min(REGISTERS // (a_warp * self.warps), by_shared, WARPS[self.architecture] // self.warps)


def launched_kernels() -> set[str]:
    """Names of the kernels that the launching code starts, from its text."""
    return {
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"\b(_\w+)\[(?:\(|grid\])", file.read_text())
    }


class _Absent:
    """A driver for a GPU that is not there: it names the target and can do nothing else."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def compiling(architecture: int) -> Iterator[list[tuple[str, Any, str]]]:
    """Let launches compile instead; yields name, compiled kernel and ptxas' words of those compiled."""
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    built: list[tuple[str, Any, str]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        # A variant that this process compiled before is silent.
        if "Used" in said.getvalue():
            built.append((self.fn.__name__, kernel, said.getvalue()))

    driver.set_active(_Absent(architecture))
    triton.knobs.nvidia.dump_ptxas_log = True
    JITFunction.run = compile_only
    try:
        yield built
    finally:
        JITFunction.run = launch


def _step(requests: int, tokens: int) -> TierBatch:
    """A step of requests with as many rows each; the first one's last ranks where there are several rows."""
    rows = torch.arange(requests * tokens)
    starts = [request * tokens for request in range(requests + 1)]
    return TierBatch(
        row_plan=plan_text_rows(requests * tokens),
        positions=rows % tokens,
        query_start_loc_cpu=starts,
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        kv_row_index=rows,
        ranking_queries=[RankingQuery(0, tokens - 1, 0)] if tokens > 1 else [],
        length_bounds=[tokens] * requests,
        has_images=True,
    )


def attend(heads: Heads, pages: torch.dtype, requests: int, tokens: int) -> None:
    """Everything the attention layers of one step launch."""
    from vllm_hybrid.attention.gpu import GpuAttention

    ops = GpuAttention()
    dtype = DTYPES[0] if pages == FP8 else pages
    facts = torch.zeros(2, BLOCK_SIZE, fact_words(PATCHES), dtype=torch.int32)
    table = torch.zeros(requests, LONGEST // BLOCK_SIZE, dtype=torch.int32)
    lengths = torch.full((requests,), tokens, dtype=torch.int32)
    step = _step(requests, tokens)
    if tokens == 1:
        decodes = DecodeStep(
            row_plan=step.row_plan,
            positions=step.positions,
            query_start_loc_cpu=step.query_start_loc_cpu,
            query_start_loc=step.query_start_loc,
            facts=facts,
            block_table=table,
            seq_lens=lengths,
            slots=step.kv_row_index,
            patches=PATCHES,
            kv_rows_per_block=BLOCK_SIZE,
        )
        plan = ops.plan_decodes(decodes, torch.zeros(requests, dtype=torch.bool))
    else:
        plan = ops.plan(step, ops.build_key_index(facts, table, lengths, PATCHES, BLOCK_SIZE))
    # As the layer has them: stretches of one product's result.
    width = (heads.heads + 2 * heads.kv_heads) * heads.head_size
    qkv = torch.zeros(requests * tokens, width, dtype=dtype).unflatten(1, (-1, heads.head_size))
    query, key, value = qkv.split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
    kv_rows = torch.zeros(2 * BLOCK_SIZE, heads.kv_heads, 2 * heads.head_size, dtype=pages)
    cos_sin_cache = torch.zeros(LONGEST, heads.head_size)
    scale = heads.head_size**-0.5
    ops.write_pages(key, value, kv_rows, step.kv_row_index)
    ops.attend(query, kv_rows, plan, cos_sin_cache, scale, query.new_empty(query.shape))
    if plan.ranking is not None:
        ops.importance(query, kv_rows, plan, cos_sin_cache, scale)


def encode(heads: Heads, dtype: torch.dtype) -> None:
    """Everything of its own that a merging layer of the tower launches, and the end of the tower."""
    from vllm_hybrid.attention.gpu_tower import GpuTower

    ops = GpuTower()
    width = heads.heads * heads.head_size
    tokens = DeviceTokens.start(torch.zeros(2, PATCHES + 1, width, dtype=dtype), 1)
    qkv = torch.zeros(tokens.rows, 3 * width, dtype=dtype)
    query, key, value = qkv.unflatten(-1, (3, heads.heads, heads.head_size)).unbind(1)
    added = ops.attend(query, key, value, tokens, heads.head_size**-0.5).flatten(-2)
    merged = ops.merge(tokens, added, ops.metric(key), torch.zeros(2), tokens.rows // 2)
    ops.owners(merged, PATCHES)


# Requests and rows of each: prompts, one prompt, and decodes with keys cut into many, some and one part.
STEPS = ((3, 40), (1, 40), (1, 1), (5, 1), (68, 1))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _disassembled(cubin: bytes) -> str:
    """The machine code of a compiled kernel as text, by the disassembler that Triton brings."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _load_bytes(code: str) -> int:
    """Most bytes of a load (LDG) or an asynchronous copy (LDGSTS) from global memory; 4 if it says none."""
    widths = [0]
    for modifiers in re.findall(r"\bLDG(?:STS)?((?:\.\w+)*)", code):
        bits = re.findall(r"\.(?:U|S)?(8|16|64|128|256)\b", modifiers)
        widths.append(int(bits[-1]) // 8 if bits else 4)
    return max(widths)


def _described(name: str, kernel: Any, said: str, architecture: int, heads: Heads, dtype: Any) -> Build:
    code = _disassembled(kernel.asm["cubin"])
    products = [name for name in MATRIX if re.search(rf"\b{name}\b", code)]
    return Build(
        kernel=name.removeprefix("_"),
        architecture=architecture,
        heads=heads.name,
        dtype=str(dtype).removeprefix("torch."),
        warps=kernel.metadata.num_warps,
        registers=_number(r"Used (\d+) registers", said),
        spilled=_number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
        stack=_number(r"(\d+) bytes stack frame", said),
        shared=kernel.metadata.shared,
        products=products[0] if products else "",
        copies=len(re.findall(r"\bLDGSTS\b", code)),
        widest_load=_load_bytes(code),
    )


def build(architecture: int, dtypes: Sequence[torch.dtype]) -> list[Build]:
    """Compile all variants for an architecture, each once; shapes that share one name the first.

    Args:
        architecture: compute capability, times 10.
        dtypes: of queries, and of pages that are not in FP8.

    Returns:
        What each variant needs.

    """
    found = []
    with compiling(architecture) as built:
        for heads in SHAPES:
            for dtype in (*dtypes, *([FP8] if architecture in FP8_ARCHITECTURES else [])):
                for requests, tokens in STEPS:
                    attend(heads, dtype, requests, tokens)
                found += [_described(*one, architecture, heads, dtype) for one in built]
                built.clear()
        for dtype in dtypes:
            encode(TOWER, dtype)
            found += [_described(*one, architecture, TOWER, dtype) for one in built]
            built.clear()
    return found


def loop_lengths(code: str) -> list[int]:
    """Instructions between the first and the last of each loop of a disassembly, inner loops included."""
    places: dict[str, int] = {}
    found, count = [], 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            places[label[1]] = count
        if not re.search(r"/\*[0-9a-f]{4,}\*/", line):
            continue
        count += 1
        back = re.search(r"\bBRA\b[^`]*`\((\.L_x_\d+)\)", line)
        if back and back[1] in places:
            found.append(count - places[back[1]])
    return found


def print_loops(kernel: str, architecture: int) -> None:
    """Print the loops of a kernel's variants in bf16 and for the first shape, and the constants of each."""
    with compiling(architecture) as built:
        for requests, tokens in STEPS:
            attend(SHAPES[0], DTYPES[0], requests, tokens)
        for name, compiled, _ in built:
            if name == f"_{kernel}":
                lengths = loop_lengths(_disassembled(compiled.asm["cubin"]))
                print(
                    f"sm_{architecture}, {compiled.metadata.num_warps} warps: loops of {lengths} instructions"
                )


def table(builds: list[Build]) -> str:
    """Markdown: per kernel and architecture the most that any variant needs."""
    lines = [
        "| kernel | heads | sm | warps | registers | spilled | shared bytes | blocks | products | copies "
        "| bytes a load |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    groups: dict[tuple[str, str, int], list[Build]] = {}
    for one in sorted(builds, key=lambda b: (b.kernel, b.heads != SHAPES[0].name, b.architecture)):
        groups.setdefault((one.kernel, one.heads, one.architecture), []).append(one)
    for (kernel, heads, architecture), variants in groups.items():
        most = [max(getattr(v, name) for v in variants) for name in ("registers", "spilled", "shared")]
        warps, blocks = variants[0].warps, min(v.blocks for v in variants)
        instruction, copies = variants[0].products or "-", min(v.copies for v in variants)
        width = min(v.widest_load for v in variants)
        cells = (kernel, heads, architecture, warps, *most, blocks, instruction, copies, width)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--loops", metavar="KERNEL")
    parser.add_argument("--sm", type=int, choices=ARCHITECTURES, action="append")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        # A kernel from the cache would not be assembled, and ptxas would say nothing.
        os.environ["TRITON_CACHE_DIR"] = cache
        if args.loops:
            for architecture in args.sm or ARCHITECTURES:
                print_loops(args.loops, architecture)
            return
        dtypes = BRIEF if args.brief else FULL
        builds = [one for sm in args.sm or ARCHITECTURES for one in build(sm, dtypes[sm])]
    print(json.dumps([asdict(one) for one in builds]) if args.json else table(builds))


if __name__ == "__main__":
    main()
