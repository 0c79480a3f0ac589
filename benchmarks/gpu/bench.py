"""Stock vLLM and vllm-hybrid on one GPU: check, then time, then a table and JSON.

    python benchmarks/gpu/bench.py --out results.json            # on a GPU, within 9 minutes
    python benchmarks/gpu/bench.py --out results.json            # again: goes on where the time ran out
    python benchmarks/gpu/bench.py --tiny --out tiny.json        # the same script at toy size, on a CPU

Both serve LLaVA-1.5-7B's configuration with dummy weights in bf16, one after the other, each engine in a
process of its own, with attention in Triton. The vision tower has seeded random weights, the same everywhere,
so that thresholds can be calibrated on it. A cell is one load at one number of live tokens and one R; results
are written after each. A cell that is already in the file is not measured again, unless the file is another
device's or version's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from benchmarks.engine import TEXT_TOKENS, overrides  # noqa: E402

HERE = Path(__file__).resolve().parent
GIB = 1 << 30
FASTV_LAYER = 2
UNMERGED = 576
PACKAGES = ("vllm", "vllm-hybrid", "torch", "triton", "transformers")


@dataclass(frozen=True)
class Scale:
    """How much is asked of the machine.

    Attributes:
        size: key of ``model.SIZES``.
        requests: requests that arrive together.
        alone: requests sent one after the other.
        by_transformers: requests per load of the outside yardstick, by new tokens.
        loads: new tokens by load.
        capacity: requests sent to fill the pool, and their new tokens.
        pool_bytes: KV memory.
        max_num_seqs: requests an engine may run at once.
        pictures: pictures to calibrate on.
        start_s: seconds an engine is expected to take to start, for the budget.
        cell_s: seconds a cell is expected to take.

    """

    size: str
    requests: int
    alone: int
    by_transformers: dict[int, int]
    loads: dict[str, int]
    capacity: tuple[int, int]
    pool_bytes: int
    max_num_seqs: int
    pictures: int
    start_s: float
    cell_s: float


FULL = Scale(
    size="7b",
    requests=64,
    alone=8,
    by_transformers={1: 8, 32: 4, 256: 1},
    loads={"prefill": 1, "mixed": 32, "decode": 256, "alone": 32},
    capacity=(480, 64),
    pool_bytes=24 * GIB,
    max_num_seqs=512,
    pictures=32,
    start_s=60,
    cell_s=20,
)
TINY = Scale(
    size="tiny",
    requests=3,
    alone=1,
    by_transformers={1: 1, 2: 1, 4: 1},
    loads={"prefill": 1, "mixed": 2, "decode": 4, "alone": 2},
    capacity=(6, 6),
    pool_bytes=1 << 23,
    max_num_seqs=8,
    pictures=2,
    start_s=1,
    cell_s=1,
)


def cell_key(kind: str, live: int, ratio: float, load: str) -> str:
    """Name of a cell in the results."""
    return f"{kind}/{load}" if kind != "hybrid" else f"hybrid/{live}/{ratio:g}/{load}"


def cells_of(
    scale: Scale, kind: str, lives: list[int], ratio: float, loads: list[str]
) -> list[dict[str, Any]]:
    """The cells one engine can measure, in order."""
    cells = []
    for live in lives if kind == "hybrid" else [UNMERGED]:
        for load in loads:
            if load == "capacity":
                requests, tokens = scale.capacity
            else:
                requests, tokens = scale.requests, scale.loads[load]
            if load == "alone":
                requests = scale.alone
            if kind == "transformers":
                if load in ("alone", "capacity"):
                    continue
                requests = scale.by_transformers[tokens]
            if kind == "hybrid" and live == UNMERGED and ratio == 0:
                continue
            cells.append(
                {
                    "key": cell_key(kind, live, ratio, load),
                    "live": live,
                    "load": load,
                    "requests": requests,
                    "tokens": tokens,
                    "seconds": scale.cell_s,
                }
            )
    return cells


def section_of(thresholds: dict[str, list[float | None]], lives: list[int], ratio: float) -> dict[str, Any]:
    """The hybrid section an engine starts with; other levels are set while it runs."""
    merged = [live for live in lives if live < UNMERGED]
    section: dict[str, Any] = {"fastv_layer": FASTV_LAYER, "fastv_ratio": ratio}
    if merged:
        section["thresholds"] = thresholds[str(merged[0])]
    return section


def versions() -> dict[str, str]:
    """Versions of what is measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def device(tiny: bool) -> dict[str, Any]:
    """The device that is measured.

    Raises:
        RuntimeError: there is no GPU, and --tiny was not given.

    """
    import torch

    if tiny:
        return {"name": platform.machine(), "kind": "cpu"}
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device; use a GPU host, or --tiny for a toy run on a CPU")
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "kind": "cuda",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


class Results:
    """Everything measured so far, on disk after every cell."""

    def __init__(self, file: Path, facts: dict[str, Any], command: str) -> None:
        self.file = file
        self.content: dict[str, Any] = {**facts, "commands": [], "engines": {}, "cells": {}}
        if file.exists():
            old = json.loads(file.read_text())
            for key, value in facts.items():
                if old.get(key) != value:
                    raise RuntimeError(
                        f"{file} was measured with {key} {old.get(key)}, this is {value}; give another --out"
                    )
            self.content = old
        self.content["commands"].append({"command": command, "date": date.today().isoformat()})
        self.save()

    @property
    def cells(self) -> dict[str, Any]:
        return self.content["cells"]

    def save(self) -> None:
        partial = self.file.with_name(self.file.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.file)


def lines_of(command: list[str], log: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Messages of a measuring process, which is ended at the deadline with all it started.

    Raises:
        RuntimeError: it failed before the deadline; its log says why.

    """
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )

        def end() -> None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(1.0, deadline - time.time()), end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("CELL "):
                    yield json.loads(line.removeprefix("CELL "))
            process.wait()
        finally:
            timer.cancel()
            end()
    if process.returncode and time.time() < deadline:
        raise RuntimeError(f"a measuring process ended with code {process.returncode}; see {log}")


def check(folder: Path, log: Path, deadline: float) -> dict[str, Any]:
    """Answers of a tiny hybrid engine on this device against the tests' reference, in float32."""
    command = [sys.executable, str(HERE / "checking.py")]
    for message in lines_of(command, log, deadline):
        return message["check"]
    raise RuntimeError(f"the check gave no result; see {log}")


def table(cells: dict[str, Any]) -> str:
    """Markdown: every hybrid cell beside stock's."""

    def number(value: float | None, factor: float = 1e3) -> str:
        return "" if value is None else f"{value * factor:.1f}"

    def at_least(cell: dict[str, Any]) -> str:
        return ">= " if cell["limited_by_sent"] else ""

    lines = [
        "| load | live (seen) | R | requests/s | stock | ratio | TTFT, ms | stock | TPOT, ms | stock |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    memory = [
        "| live (seen) | R | KV a request, MB | stock | less | at once | stock |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, got in cells.items():
        kind, *rest = key.split("/")
        base = cells.get(f"stock/{rest[-1]}")
        if kind == "stock" or base is None:
            continue
        live, ratio = rest[:2] if kind == "hybrid" else (kind, "")
        seen = got.get("live_counts")
        live = f"{live} ({seen['mean']:.1f})" if seen else live
        if rest[-1] == "capacity":
            memory.append(
                f"| {live} | {ratio} | {number(got['kv_bytes_a_request'], 1e-6)} | "
                f"{number(base['kv_bytes_a_request'], 1e-6)} | "
                f"{base['kv_bytes_a_request'] / got['kv_bytes_a_request']:.2f}x | "
                f"{at_least(got)}{got['running_at_once']} | {at_least(base)}{base['running_at_once']} |"
            )
            continue
        lines.append(
            f"| {rest[-1]} | {live} | {ratio} | {got['requests_per_s']:.2f} | {base['requests_per_s']:.2f} | "
            f"{got['requests_per_s'] / base['requests_per_s']:.2f} | {number(got['first_token_s'])} | "
            f"{number(base['first_token_s'])} | {number(got['per_token_s'])} | "
            f"{number(base['per_token_s'])} |"
        )
    return "\n".join([*lines, "", *memory])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON; what it holds is not measured again")
    parser.add_argument("--work", type=Path, help="folder for the model and logs; default: beside --out")
    parser.add_argument("--budget", type=float, default=530, help="seconds after which nothing is begun")
    parser.add_argument("--tiny", action="store_true", help="toy size on a CPU")
    parser.add_argument("--kinds", default="stock,hybrid,transformers,off")
    parser.add_argument("--lives", default="90,195,394", help="wanted live tokens; 576: no merging")
    parser.add_argument("--ratios", default="0.5,0,0.75")
    parser.add_argument("--loads", default="prefill,mixed,decode,alone,capacity")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-check", action="store_true", help="time without checking the answers first")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture")
    args = parser.parse_args()
    deadline = time.time() + args.budget
    scale = TINY if args.tiny else FULL
    work = args.work or args.out.with_name(args.out.stem + "-work")
    work.mkdir(parents=True, exist_ok=True)
    try:
        where = device(args.tiny)
        facts = {"device": where, "versions": versions(), "scale": scale.size, "repeats": args.repeats}
        results = Results(args.out, facts, " ".join(["python", *sys.argv]))
        measure(args, scale, where["kind"] == "cuda", work, results, deadline)
    except RuntimeError as error:
        print(error)
        return 1
    finally:
        if args.out.exists():
            print(table(json.loads(args.out.read_text())["cells"]))
    return 0


def measure(
    args: argparse.Namespace, scale: Scale, cuda: bool, work: Path, results: Results, deadline: float
) -> None:
    """Check, then run every engine that has cells left and time to start.

    Raises:
        RuntimeError: the check failed or an engine did.

    """
    from benchmarks.gpu.model import SIZES, find_thresholds, write_folder

    folder = write_folder(work / f"model-{scale.size}", SIZES[scale.size])
    if not args.no_check and "check" not in results.content:
        found = check(folder, work / "check.log", deadline)
        if not found["agrees"]:
            raise RuntimeError(
                f"answers differ from the reference by {found['worst']:.4f}; see {work}/check.log"
            )
        results.content["check"] = found
        results.save()
        print(f"checked: log probabilities within {found['worst']:.5f} of the reference", flush=True)
    lives = [int(live) for live in args.lives.split(",")]
    levels = find_thresholds(folder, lives, scale.pictures)
    thresholds: dict[str, list[float | None]] = {live: level["thresholds"] for live, level in levels.items()}
    executed = SIZES[scale.size].vision_layers - 1
    thresholds[str(UNMERGED)] = [None] * executed
    results.content["calibration"] = levels
    results.save()
    for number, (kind, ratio) in enumerate(engines(args)):
        loads = args.loads.split(",")
        cells = cells_of(scale, kind, lives, ratio, loads)
        cells = [cell for cell in cells if cell["key"] not in results.cells]
        if not cells:
            continue
        if time.time() + scale.start_s + scale.cell_s > deadline:
            print(f"no time left for {kind} R={ratio:g}; run the same command again", flush=True)
            continue
        section = section_of(thresholds, lives, ratio)
        plan = {
            "kind": kind,
            "cuda": cuda,
            "overrides": None if kind == "transformers" else overrides(kind, section),
            "thresholds": thresholds,
            "cells": cells,
            "deadline": deadline,
            "repeats": args.repeats,
            # No two engines, and no two runs of this script, send the same pictures.
            "seed": 1000 * (number + 10 * len(results.content["commands"])),
            "eager": args.eager or args.tiny,
            "graph_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
            "max_model_len": 2048,
            "step_tokens": 16384,
            "max_num_seqs": scale.max_num_seqs,
            "pool_bytes": scale.pool_bytes,
            "warm_up": min(16, scale.requests),
        }
        script = "one_at_a_time.py" if kind == "transformers" else "serving.py"
        name = f"{kind}-{ratio:g}" if kind == "hybrid" else kind
        print(f"measuring {name}: {len(cells)} cells", flush=True)
        command = [sys.executable, str(HERE / script), str(folder), json.dumps(plan)]
        for message in lines_of(command, work / f"{name}.log", deadline):
            if "started_s" in message:
                results.content["engines"][name] = {
                    "started_s": message["started_s"],
                    "text_tokens": TEXT_TOKENS,
                    **{k: plan[k] for k in ("pool_bytes", "max_num_seqs", "step_tokens", "eager")},
                }
            elif "skipped" in message:
                print(f"no time left for {message['skipped']}; run the same command again", flush=True)
            else:
                results.cells[message["key"]] = message["result"]
            results.save()


def engines(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Kind and R of every engine, in order."""
    found = []
    for kind in args.kinds.split(","):
        if kind == "hybrid":
            found += [(kind, float(ratio)) for ratio in args.ratios.split(",")]
        else:
            found.append((kind, 0.0))
    return found


if __name__ == "__main__":
    sys.exit(main())
