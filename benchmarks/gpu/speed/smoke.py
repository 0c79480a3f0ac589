"""Whether every kind of engine starts and answers: two decoder layers of the 7B model, dummy weights.

Every engine first runs eagerly, then compiled and with CUDA graphs. None that fails stops another.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine import overrides
from benchmarks.gpu.running.cases import UNLIMITED_S
from benchmarks.gpu.running.processes import Measuring, ProcessFailed, lines_of
from benchmarks.gpu.running.results import Results
from benchmarks.gpu.speed.bench import caches
from benchmarks.gpu.speed.cells import GIB, KINDS, UNMERGED
from benchmarks.gpu.speed.model import SIZES, tower_file, write_folder
from benchmarks.gpu.speed.prepared import prepare_pictures
from vllm_hybrid.checkpoint.writing import LlavaShape

HERE = Path(__file__).resolve().parent
EAGER, GRAPHS = "eager", "graphs"
# Below every cosine: each layer merges as many tokens as it may, so that the count is known beforehand.
MERGE_ALL = -1.0
FASTV_LAYER = 1
REQUESTS, TOKENS = 3, 4
PICTURES = 4
CEILINGS = "ceilings"
CEILINGS_S = 30
# A slow CPU is given all the time there is.
START_LIMIT_S, TINY_START_LIMIT_S = 200.0, UNLIMITED_S
LEAST_S = 25


@dataclass(frozen=True)
class Start:
    """One engine to start.

    Attributes:
        kind: of ``cells.KINDS``.
        ratio: R of the hybrid.
        mode: EAGER or GRAPHS.

    """

    kind: str
    ratio: float
    mode: str

    @property
    def key(self) -> str:
        """Name in the results."""
        kind = f"{self.kind} R={self.ratio:g}" if self.kind == "hybrid" else self.kind
        return f"{kind}, {self.mode}"


def starts(kinds: Sequence[str], tiny: bool) -> list[Start]:
    """All engines, those without compilation first; a CPU has no graphs."""
    engines = [("stock", 0.0), ("stock_triton", 0.0), ("off", 0.0), ("hybrid", 0.0), ("hybrid", 0.5)]
    return [
        Start(kind, ratio, mode)
        for mode in ((EAGER,) if tiny else (EAGER, GRAPHS))
        for kind, ratio in engines
        if kind in kinds
    ]


def expected_live(size: LlavaShape) -> int:
    """Live tokens of an image where every executed vision layer merges all it may."""
    live = UNMERGED
    for _ in range(size.vision_layers - 1):
        live -= live // 2
    return live


def plan_of(start: Start, size: LlavaShape, tiny: bool) -> dict[str, Any]:
    """What a measuring process is told of its engine."""
    section: dict[str, Any] = {"fastv_layer": FASTV_LAYER, "fastv_ratio": start.ratio}
    section["thresholds"] = [MERGE_ALL] * (size.vision_layers - 1)
    return {
        "kind": start.kind,
        "cuda": not tiny,
        "overrides": overrides(start.kind, section),
        "merges": False,
        "repeats": 1,
        "seed": 0,
        "eager": start.mode == EAGER,
        "graph_sizes": [1, 2, 4],
        # One of the two that merge captures its tower, so that both ways are seen to start.
        "tower_graphs": start.kind == "hybrid" and start.ratio > 0,
        "max_model_len": 2048,
        "step_tokens": 4096,
        "max_num_seqs": 8,
        "pool_bytes": 1 << 24 if tiny else 2 * GIB,
        # Several engines share the device.
        "memory_share": None if tiny else 0.2,
        "pictures": PICTURES,
        "warm_up": [],
    }


def question() -> dict[str, Any]:
    """REQUESTS requests with a picture each, in flight together."""
    return {
        "load": "smoke",
        "live": UNMERGED,
        "requests": REQUESTS,
        "concurrency": REQUESTS,
        "tokens": TOKENS,
        "rate": None,
    }


def wrong_with(start: Start, size: LlavaShape, result: dict[str, Any]) -> str | None:
    """What is wrong with an engine's answer, None where nothing is."""
    if result["pictures_encoded"] < REQUESTS:
        return f"{result['pictures_encoded']} of {REQUESTS} pictures were encoded"
    if start.kind != "hybrid":
        return None
    seen, wanted = result.get("live_counts"), expected_live(size)
    if seen is None:
        return f"no live counts were reported; every image should have {wanted}"
    if seen["least"] != wanted or seen["most"] != wanted:
        return f"images have {seen['least']} to {seen['most']} live tokens instead of {wanted}"
    return None


def run_start(
    start: Start, folder: Path, size: LlavaShape, work: Path, deadline: float, tiny: bool
) -> dict[str, Any]:
    """Start one engine and have it answer.

    Returns:
        ``ok``, seconds to start and to answer, and what the engine chose.

    Raises:
        ProcessFailed: it did not start or answer in time, or answered wrongly.

    """
    name = start.key.replace(", ", "-").replace(" ", "-")
    # Engines that start at the same time do not write one compile cache; Triton's bears it.
    environment = caches(work) | {
        "VLLM_CACHE_ROOT": str((work / "caches" / "smoke" / name).resolve()),
        "TORCHINDUCTOR_CACHE_DIR": str((work / "caches" / "smoke" / name / "inductor").resolve()),
    }
    command = [sys.executable, str(HERE / "serving.py"), str(folder), json.dumps(plan_of(start, size, tiny))]
    began = time.time()
    child = Measuring(command, work / f"smoke-{name}.log", environment)
    try:
        limit = TINY_START_LIMIT_S if tiny else START_LIMIT_S
        started = child.next(min(deadline, began + limit))
        ready = time.time()
        child.send(question())
        answer = child.next(min(deadline, ready + limit))
        assert started is not None and answer is not None
        if wrong := wrong_with(start, size, answer["result"]):
            raise ProcessFailed(f"{wrong}; see {child.log}")
        took = {"started_s": ready - began, "answered_s": time.time() - ready}
        return {"ok": True, **took, "facts": started["facts"], "answer": answer["result"]}
    finally:
        child.end()


def ceilings(log: Path, deadline: float) -> dict[str, float]:
    """Bytes/s of a large copy and operations/s of a large bf16 product on this device."""
    code = "import json; from benchmarks.gpu.kernels.calls import ceilings as c; "
    code += "print('CELL ' + json.dumps(c()), flush=True)"
    for found in lines_of([sys.executable, "-c", code], log, deadline):
        return found
    raise ProcessFailed(f"the ceilings were not measured; see {log}")


def run(
    results: Results,
    kinds: Sequence[str],
    work: Path,
    deadline: float,
    tiny: bool,
    at_once: int,
    progress: Callable[[], None],
) -> None:
    """Start every engine that has not started yet.

    Args:
        results: what is in it is not tried again; failures are.
        kinds: of ``cells.KINDS``.
        work: folder for model, caches and logs.
        deadline: seconds since the epoch.
        tiny: toy size on a CPU.
        at_once: engines that start at the same time.
        progress: called after every one.

    """
    name = "tiny" if tiny else "7b-short"
    size = SIZES[name]
    folder = write_folder(work / f"model-smoke-{name}", size)
    tower_file(folder)
    prepare_pictures(folder, PICTURES)
    lock = threading.Lock()

    def attempt(key: str, work_of: Callable[[], dict[str, Any]]) -> None:
        if time.time() + LEAST_S > deadline:
            return
        try:
            found = work_of()
        except ProcessFailed as error:
            with lock:
                results.failed(key, str(error))
        else:
            with lock:
                results.cells[key] = found
                results.failures.pop(key, None)
                results.save()
        progress()

    if not tiny and CEILINGS not in results.cells:
        attempt(CEILINGS, lambda: ceilings(work / "ceilings.log", min(deadline, time.time() + CEILINGS_S)))
    for mode in (EAGER, GRAPHS):
        with ThreadPoolExecutor(at_once) as pool:
            for one in starts(kinds, tiny):
                if one.mode == mode and one.key not in results.cells:
                    pool.submit(attempt, one.key, partial(run_start, one, folder, size, work, deadline, tiny))


def table(content: dict[str, Any], tiny: bool) -> str:
    """Markdown: every engine, ok or why not, and what it chose."""
    lines = [
        "| engine | | start, s | decoder attention | tower attention | blocks | compile, graphs |",
        "|---|---|--:|---|---|---|---|",
    ]
    for one in starts(KINDS, tiny):
        lines.append(_row(one.key, content["cells"].get(one.key), content["failures"].get(one.key)))
    if found := content["cells"].get(CEILINGS):
        lines += [
            "",
            f"ceilings here: a copy moves {found['bytes_per_s'] / 1e12:.2f} TB/s, an 8192 x 8192 x 8192 ",
        ]
        lines[-1] += f"product in bf16 runs at {found['flops_per_s'] / 1e12:.0f} TFLOP/s"
    if failed := content["failures"].get(CEILINGS):
        lines += ["", f"ceilings: FAILED: {failed['error']}"]
    return "\n".join(lines)


def _row(key: str, cell: dict[str, Any] | None, failure: dict[str, Any] | None) -> str:
    if cell is None:
        said = "not tried" if failure is None else f"FAILED: {failure['error']}"
        return f"| {key} | {said} | | | | | |"
    chose = cell["facts"]
    attention = [", ".join(chose[part]) for part in ("decoder_attention", "tower_attention")]
    blocks = ", ".join(map(str, chose["block_sizes"]))
    return (
        f"| {key} | ok | {cell['started_s']:.0f} | {attention[0]} | {attention[1]} | {blocks} | "
        f"{chose['compile_mode']}, {chose['graph_mode']}{', tower' if chose['tower_graphs'] else ''} |"
    )
