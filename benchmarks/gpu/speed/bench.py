"""Stock vLLM and vllm-hybrid on one GPU, load by load, into a table and JSON.

    python benchmarks/gpu/speed/bench.py --out results.json            # on a GPU, within 9 minutes
    python benchmarks/gpu/speed/bench.py --out results.json            # again: goes on where the time ran out
    python benchmarks/gpu/speed/bench.py --tiny --out tiny.json        # the same script at toy size, on a CPU

All serve LLaVA-1.5-7B's configuration with dummy weights in bf16, one after the other, each engine in a
process of its own. `stock` is vLLM as it chooses everything itself, `stock_triton` the same held to Triton's
attention; `off` and `hybrid` are what a user of the plugin gets. The vision tower has seeded random weights,
the same everywhere, so that thresholds can be calibrated on it. A cell is one load on one engine at one
number of live tokens; results are written after each. A cell that is already in the file is not measured
again, unless the file is another device's or version's, or the plugin's code has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO))

from benchmarks.engine import TEXT_TOKENS, overrides  # noqa: E402
from benchmarks.gpu.running import facts  # noqa: E402
from benchmarks.gpu.running.processes import Measuring, ProcessFailed, lines_of  # noqa: E402
from benchmarks.gpu.running.results import Results, begin  # noqa: E402
from benchmarks.gpu.speed import tables  # noqa: E402
from benchmarks.gpu.speed.cells import (  # noqa: E402
    FULL,
    KINDS,
    LOADS,
    TINY,
    UNMERGED,
    Cell,
    Engine,
    Scale,
    arrivals_at,
    cell_key,
    cells_of,
    engines_of,
    saturated_rate,
)

__all__ = ["FULL", "TINY", "Results", "cell_key", "cells_of", "lines_of", "main", "measure"]

HERE = Path(__file__).resolve().parent
FASTV_LAYER = 2
MAX_MODEL_LEN = 2048
LIVES = "90,195,394"
# A cell that takes this many times what was expected hangs.
HANGS = 6
# What failed this often is not tried again.
TRIES = 2
# Seconds left for the last table.
MARGIN_S = 3.0


@dataclass(frozen=True)
class Run:
    """What stays the same over all engines of a run.

    Attributes:
        scale: how much is asked.
        cuda: whether there is a GPU.
        eager: whether engines neither compile nor capture.
        tower_graphs: whether the hybrid captures its tower as well.
        repeats: most repeats of a cell.
        loads: of ``cells.LOADS``.
        folder: the model.
        work: logs and caches.
        thresholds: by number of live tokens.
        deadline: seconds since the epoch.
        library: fingerprint of the plugin's code.
        progress: called after every change of the results.

    """

    scale: Scale
    cuda: bool
    eager: bool
    tower_graphs: bool
    repeats: int
    loads: Sequence[str]
    folder: Path
    work: Path
    thresholds: dict[str, list[float | None]]
    deadline: float
    library: str
    progress: Callable[[], None]

    @property
    def left_s(self) -> float:
        """Seconds left to measure in."""
        return self.deadline - MARGIN_S - time.time()


def caches(work: Path) -> dict[str, str]:
    """Environment that has all engines and calls share what they compile."""
    folders = {
        "VLLM_CACHE_ROOT": "vllm",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }
    return {name: str((work / "caches" / folder).resolve()) for name, folder in folders.items()}


def section_of(thresholds: dict[str, list[float | None]], engine: Engine) -> dict[str, Any]:
    """The hybrid section an engine starts with; other levels are set while it runs."""
    merged = [live for live in engine.lives if live < UNMERGED]
    chosen = thresholds[str(merged[0])] if merged else None
    return {"fastv_layer": FASTV_LAYER, "fastv_ratio": engine.ratio, "thresholds": chosen}


def plan_of(run: Run, engine: Engine, seed: int) -> dict[str, Any]:
    """What a measuring process is told of its engine."""
    section = section_of(run.thresholds, engine)
    return {
        "kind": engine.kind,
        "cuda": run.cuda,
        "overrides": None if engine.kind == "transformers" else overrides(engine.kind, section),
        "thresholds": run.thresholds,
        "merges": section["thresholds"] is not None,
        "repeats": run.repeats,
        "seed": seed,
        "eager": run.eager,
        "tower_graphs": run.tower_graphs and engine.kind == "hybrid",
        "max_model_len": MAX_MODEL_LEN,
        "step_tokens": run.scale.step_tokens,
        "max_num_seqs": run.scale.max_num_seqs,
        "pool_bytes": run.scale.pool_bytes,
        "pictures": run.scale.pictures,
        "warm_up": list(run.scale.warm_up),
    }


def expected_start_s(run: Run, results: Results, engine: Engine) -> float:
    """Seconds until an engine answers: its own last start, else the longest seen, else a guess."""
    seen = results.engines.get(engine.name)
    if seen:
        return float(seen["started_s"][-1])
    starts = [start for other in results.engines.values() for start in other["started_s"]]
    return max(starts, default=run.scale.start_s)


def expected_cell_s(results: Results, cell: Cell) -> float:
    """Seconds a cell takes: what it took on stock, or what is expected."""
    stock = results.cells.get(f"stock/{cell.name}")
    return float(stock["cell_s"]) if stock else cell.expected_s


def measured(run: Run, results: Results, key: str) -> bool:
    """Whether a cell has its result; what was measured eagerly gives way to a run with graphs."""
    cell = results.cells.get(key)
    return cell is not None and (run.eager or not cell.get("eager", False))


def cells_left(run: Run, results: Results, engine: Engine) -> list[tuple[int, Cell]]:
    """Cells of an engine without a result, with their number of live tokens; those that failed come last."""
    left = []
    for live in engine.lives:
        for cell in cells_of(run.scale, engine, run.loads):
            key = engine.key(live, cell)
            if not measured(run, results, key) and results.failures.get(key, {}).get("times", 0) < TRIES:
                left.append((live, cell))
    return sorted(left, key=lambda one: engine.key(*one) in results.failures)


def reserved_s(run: Run, results: Results, later: Sequence[Engine]) -> float:
    """Seconds that the first table still needs from the hybrid, if it is to come."""
    for engine in later:
        if engine.kind == "hybrid" and not engine.narrow:
            cells = [cell for _, cell in cells_left(run, results, engine) if cell.headline]
            needed = sum(expected_cell_s(results, cell) for cell in cells)
            return expected_start_s(run, results, engine) + needed if cells else 0.0
    return 0.0


def set_older_aside(results: Results, library: str) -> None:
    """Have cells of the plugin that other code measured measured again; stock's cells stay.

    Args:
        results: of earlier calls; the old cells stay in them under ``older``.
        library: fingerprint of the code at hand.

    """
    if results.content.get("library", library) != library:
        results.failures.clear()
        old = [key for key in results.cells if key.startswith(("hybrid/", "off/"))]
        older = results.content.setdefault("older", {}).setdefault(results.content["library"], {})
        older |= {key: results.cells.pop(key) for key in old}
    results.content["library"] = library
    results.save()


def one_more_try(results: Results) -> None:
    """Have everything that was given up tried once more: a new call may follow a repair."""
    for failure in results.failures.values():
        failure["times"] = min(failure["times"], TRIES - 1)
    results.save()


def say_left_out(results: Results) -> None:
    """Print what failed so often that this call tried it no more."""
    left_out = [key for key, failure in results.failures.items() if failure["times"] >= TRIES]
    if left_out:
        print(f"left out after {TRIES} failures, the next call tries it: {', '.join(left_out)}", flush=True)


def measure(run: Run, results: Results, engines: Sequence[Engine]) -> None:
    """Run every engine that has cells left and time to start; none that fails stops the next."""
    for number, engine in enumerate(engines):
        reserve = reserved_s(run, results, engines[number + 1 :]) if engine.kind == "stock" else 0.0
        for _ in range(TRIES):
            if not _measure_engine(run, results, engine, reserve):
                break
    say_left_out(results)


def _measure_engine(run: Run, results: Results, engine: Engine, reserve: float) -> bool:
    """Start an engine and run its cells.

    Returns:
        Whether it failed and is worth another start for the cells that are left.

    """
    left = cells_left(run, results, engine)
    if not left or results.failures.get(engine.name, {}).get("times", 0) >= TRIES:
        return False
    if expected_start_s(run, results, engine) + expected_cell_s(results, left[0][1]) > run.left_s:
        print(f"no time left for {engine.name}; run the same command again", flush=True)
        return False
    # No two engines, and no two runs of this script, send the same texts.
    plan = plan_of(run, engine, 1000 * len(results.content["commands"]) + len(results.engines))
    script = "one_at_a_time.py" if engine.kind == "transformers" else "serving.py"
    command = [sys.executable, str(HERE / script), str(run.folder), json.dumps(plan)]
    print(f"measuring {engine.name}: {len(left)} cells", flush=True)
    began = time.time()
    child = Measuring(command, run.work / f"{engine.name}.log", caches(run.work))
    doing = engine.name
    try:
        started = _answer(child, min(run.deadline, began + run.scale.start_limit_s))
        _note_start(results, engine, plan, started, time.time() - began)
        for live, cell in left:
            if (asked := _ready(run, results, cell, reserve)) is not None:
                doing = engine.key(live, cell)
                _note_cell(run, results, doing, _ask(run, results, child, live, asked))
    except ProcessFailed as error:
        return _note_failure(run, results, doing, error)
    finally:
        child.end()
    return False


def _ask(run: Run, results: Results, child: Measuring, live: int, cell: Cell) -> dict[str, Any]:
    """Have a cell measured; one that takes far longer than expected has failed."""
    child.send(dataclasses.asdict(cell) | {"live": live})
    limit = max(run.scale.cell_limit_s, HANGS * expected_cell_s(results, cell))
    result: dict[str, Any] = _answer(child, min(run.deadline, time.time() + limit))["result"]
    return result


def _answer(child: Measuring, until: float) -> dict[str, Any]:
    answer = child.next(until)
    if answer is None:
        raise ProcessFailed(f"a measuring process ended without an answer; see {child.log}")
    return answer


def _note_cell(run: Run, results: Results, key: str, result: dict[str, Any]) -> None:
    results.cells[key] = result | {"library": run.library, "eager": run.eager}
    results.failures.pop(key, None)
    results.save()
    run.progress()


def _note_failure(run: Run, results: Results, key: str, error: ProcessFailed) -> bool:
    """Keep why an engine or a cell failed; returns whether it did so before the time was over."""
    if time.time() >= run.deadline:
        print(f"the time is over in {key}; run the same command again", flush=True)
        return False
    results.failed(key, str(error))
    print(f"FAILED {key}: {error}", flush=True)
    run.progress()
    return True


def _ready(run: Run, results: Results, cell: Cell, reserve: float) -> Cell | None:
    """The cell as it is to be run, None where there is no time, or no rate of stock to go by."""
    expected = expected_cell_s(results, cell)
    if expected + (0.0 if cell.headline else reserve) > run.left_s:
        return None
    if cell.share is None:
        return cell
    saturated = saturated_rate(results.cells)
    return None if saturated is None else arrivals_at(cell, saturated, run.scale)


def _note_start(
    results: Results, engine: Engine, plan: dict[str, Any], started: dict[str, Any], took: float
) -> None:
    """Keep what an engine said of itself, and every time it took to start."""
    before = results.engines.get(engine.name, {}).get("started_s", [])
    sizes = {
        name: plan[name] for name in ("pool_bytes", "max_num_seqs", "step_tokens", "eager", "tower_graphs")
    }
    results.engines[engine.name] = {
        "started_s": [*before, took],
        "text_tokens": TEXT_TOKENS,
        "facts": started.get("facts", {}),
        **sizes,
    }
    results.failures.pop(engine.name, None)
    results.save()


def prepare(scale: Scale, work: Path, lives: Sequence[int]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Model folder, tower, pictures and thresholds: made once, found again by later calls.

    Returns:
        The folder, and thresholds with the counts they leave by number of live tokens.

    """
    from benchmarks.gpu.speed.model import SIZES, find_thresholds, tower_file, write_folder
    from benchmarks.gpu.speed.prepared import prepare_pictures

    folder = write_folder(work / f"model-{scale.size}", SIZES[scale.size])
    tower_file(folder)
    prepare_pictures(folder, scale.pictures)
    levels = find_thresholds(folder, lives, scale.calibration)
    executed = SIZES[scale.size].vision_layers - 1
    return folder, levels | {str(UNMERGED): {"thresholds": [None] * executed, "counts": []}}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON; what it holds is not measured again")
    parser.add_argument("--work", type=Path, help="folder for model, caches and logs; default: beside --out")
    parser.add_argument("--budget", type=float, default=530, help="seconds after which all ends")
    parser.add_argument("--tiny", action="store_true", help="toy size on a CPU")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--lives", default=LIVES, help="wanted live tokens; 576: no merging")
    parser.add_argument("--ratios", default="0.5,0,0.75")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--check", type=Path, action="append", default=[], help="JSON of a check, for the table's head"
    )
    parser.add_argument(
        "--eager", action="store_true", help="neither compile nor capture; its cells are marked"
    )
    parser.add_argument(
        "--tower-graphs", action="store_true", help="the hybrid captures its tower as well; --out of its own"
    )
    parser.add_argument("--commit", help="of the sources, where they are not a checkout")
    return parser


def run_benchmark(args: argparse.Namespace, progress: Callable[[Results], None]) -> Results:
    """All of a run of this script but its last table.

    Raises:
        RuntimeError: there is no device, or --out belongs to another one.

    """
    deadline = time.time() + args.budget
    scale = TINY if args.tiny else FULL
    work = args.work or args.out.with_name(args.out.stem + "-work")
    work.mkdir(parents=True, exist_ok=True)
    results = begin(args.out, args.tiny, args.commit, scale=scale.size, repeats=args.repeats)
    library = facts.library()
    set_older_aside(results, library)
    one_more_try(results)
    lives = [int(live) for live in args.lives.split(",")]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder, levels = prepare(scale, work, lives)
    results.content["calibration"] = {name: level["counts"] for name, level in levels.items()}
    results.save()
    run = Run(
        scale=scale,
        cuda=results.content["device"]["kind"] == "cuda",
        eager=args.eager or args.tiny,
        tower_graphs=args.tower_graphs,
        repeats=args.repeats,
        loads=args.loads.split(","),
        folder=folder,
        work=work,
        thresholds={name: level["thresholds"] for name, level in levels.items()},
        deadline=deadline,
        library=library,
        progress=lambda: progress(results),
    )
    ratios = [float(ratio) for ratio in args.ratios.split(",")]
    measure(run, results, engines_of(args.kinds.split(","), lives, ratios))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    try:
        results = run_benchmark(args, lambda _: None)
    except RuntimeError as error:
        print(error)
        return 1
    print(tables.report(results.content, tables.check_lines(args.check), short=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
