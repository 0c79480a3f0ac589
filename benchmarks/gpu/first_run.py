"""The first run on a GPU, stage by stage, each within its minutes; a stage called again goes on where it was.

    python benchmarks/gpu/first_run.py --out DIR --stage smoke      # does every kind of engine start?
    python benchmarks/gpu/first_run.py --out DIR --stage correct    # kernels and answers against references
    python benchmarks/gpu/first_run.py --out DIR --stage speed      # stock and hybrid, load by load
    python benchmarks/gpu/first_run.py --out DIR --stage profile    # where do a step's milliseconds go?

DIR then holds the results of all stages so far in at most eight files; DIR/work has model, pictures, compile
caches and logs. Nothing that fails ends a stage before its time: it is noted, and the next is tried. The exit
status is 1 only where there is no device, DIR belongs to another one, or a stage itself broke.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from benchmarks.gpu.checks import tables as check_tables  # noqa: E402
from benchmarks.gpu.kernels import tables as kernel_tables  # noqa: E402
from benchmarks.gpu.running import facts  # noqa: E402
from benchmarks.gpu.running.cases import TRIES  # noqa: E402
from benchmarks.gpu.running.processes import (  # noqa: E402
    ProcessFailed,
    end_descendants,
    end_tree,
    last_error,
    lines_of,
)
from benchmarks.gpu.running.publishing import Publisher, sizes, take_back  # noqa: E402
from benchmarks.gpu.running.results import Results, begin  # noqa: E402
from benchmarks.gpu.running.tables import head, state  # noqa: E402
from benchmarks.gpu.speed import bench, tables  # noqa: E402
from benchmarks.gpu.speed.cells import FULL, KINDS, TINY, Engine  # noqa: E402

HERE = Path(__file__).resolve().parent
# Seconds before its end at which a stage's work is over, and at which it is ended by force.
CLOSING_S, FORCED_S = 12.0, 5.0
# Seconds that ending by force itself may take before the process is gone whatever it does.
FORCED_END_S = 20.0
# Seconds that a script gets to end in after its last case, and the fewest it is worth starting with.
SCRIPT_END_S, LEAST_SCRIPT_S = 10.0, 30.0
# Share of the stage's time after which the kernels' check makes room for the engines'.
KERNELS_SHARE = 0.4
PROFILED = (Engine("stock"), Engine("hybrid", 0.5, (90,)))
PROFILE_S = 90
# Most lines of the table that a stage prints last.
SCREEN = 90
# Most lines of it for checks that do not agree.
WRONG_LINES = 25
SUBREAPER = 36


@dataclass(frozen=True)
class Stage:
    """What a stage works with.

    Attributes:
        args: the command line.
        work: folder for everything that is not a result.
        deadline: seconds since the epoch at which its work is over.
        publisher: writes results.

    """

    args: argparse.Namespace
    work: Path
    deadline: float
    publisher: Publisher

    @property
    def left_s(self) -> float:
        """Seconds left to work in."""
        return self.deadline - time.time()

    @property
    def eager(self) -> bool:
        """Whether engines neither compile nor capture."""
        return bool(self.args.eager or self.args.tiny)

    def results(self, name: str) -> Results:
        """The stage's file, begun or gone on with.

        Raises:
            RuntimeError: it was made on another device or with other versions.

        """
        return begin(self.work / f"{name}.json", self.args.tiny, self.args.commit)


def kinds_of(args: argparse.Namespace) -> list[str]:
    """Kinds of engine asked for."""
    return str(args.kinds).split(",")


def smoke(stage: Stage) -> None:
    """Start every kind of engine on two layers; measure the device's ceilings."""
    from benchmarks.gpu.speed import smoke as starting

    results = stage.results("smoke")
    library = facts.library()
    if results.content.get("library", library) != library:
        results.cells.clear()
        results.failures.clear()
    results.content["library"] = library
    preparing = start_preparing(stage)
    at_once = 1 if stage.args.tiny else stage.args.at_once
    kinds = kinds_of(stage.args)
    starting.run(
        results, kinds, stage.work, stage.deadline, stage.args.tiny, at_once, stage.publisher.results
    )
    try:
        preparing.wait(max(0.0, stage.left_s))
    except subprocess.TimeoutExpired:
        print("model and pictures of the next stages are not ready; they will make them", flush=True)


def start_preparing(stage: Stage) -> subprocess.Popen[str]:
    """Make model folder, tower, pictures and thresholds of the later stages while engines start."""
    scale = "TINY" if stage.args.tiny else "FULL"
    lives = stage.args.lives or bench.LIVES
    code = "import sys; from pathlib import Path; from benchmarks.gpu.speed import bench, cells; "
    code += f"bench.prepare(cells.{scale}, Path(sys.argv[1]), [int(n) for n in sys.argv[2].split(',')])"
    with (stage.work / "prepare.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(stage.work), lives],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])},
        )


def correct(stage: Stage) -> None:
    """Kernels against plain torch, engines against the tests' reference, then times of kernels."""
    began = stage.left_s
    more = ["--again", "--commit", stage.args.commit or facts.commit()]
    kernels = ["kernels/run.py", "--out", str(stage.work / "kernels.json"), *more]
    checking = ["checks/run.py", "--out", str(stage.work / "checking.json"), *more]
    script(stage, "kernels-check", [*kernels, "--check-only"], KERNELS_SHARE * began)
    script(stage, "checking", checking, stage.left_s)
    script(stage, "kernels-time", [*kernels, "--time-only"], stage.left_s)


def script(stage: Stage, name: str, command: Sequence[str], seconds: float) -> None:
    """Run one of the scripts beside this one within some seconds; how it ends is said and ends nothing."""
    if seconds < LEAST_SCRIPT_S:
        print(f"no time left for {name}; run the same stage again", flush=True)
        return
    tiny = ["--tiny"] if stage.args.tiny else []
    minutes = f"{(seconds - SCRIPT_END_S) / 60:.3f}"
    whole = [sys.executable, str(HERE / command[0]), *command[1:], "--minutes", minutes, *tiny]
    log = stage.work / f"{name}.log"
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    in_time = True
    with log.open("w") as file:
        process = subprocess.Popen(
            whole,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **bench.caches(stage.work)},
        )
        try:
            process.wait(seconds + FORCED_S)
        except subprocess.TimeoutExpired:
            print(f"{name} was ended after its time", flush=True)
            in_time = False
        end_tree(process)
    end_descendants()
    if in_time and process.returncode:
        print(f"{name} FAILED with code {process.returncode}: {last_error(log)}; see {log}", flush=True)


def speed(stage: Stage) -> None:
    """The benchmark, as far as the time goes."""
    command = ["--out", str(stage.work / "speed.json"), "--work", str(stage.work)]
    command += ["--budget", f"{stage.left_s:.1f}", "--kinds", stage.args.kinds]
    command += ["--eager"] if stage.args.eager else []
    command += ["--tower-graphs"] if stage.args.tower_graphs else []
    for option in ("lives", "ratios", "loads", "commit"):
        if value := getattr(stage.args, option):
            command += [f"--{option}", value]
    if stage.args.tiny:
        command += ["--tiny", "--repeats", "1"]
    bench.run_benchmark(bench.arguments().parse_args(command), lambda _: stage.publisher.results())


def profile(stage: Stage) -> None:
    """Traces of a prefill and a decode step of stock and of the hybrid."""
    results = stage.results("profile")
    scale = TINY if stage.args.tiny else FULL
    for engine in PROFILED:
        if engine.kind in kinds_of(stage.args) and not _profiled(results, engine, stage.eager):
            _profile_engine(stage, results, engine, scale.step_tokens // 640)


def _profiled(results: Results, engine: Engine, eager: bool) -> bool:
    """Whether an engine has its profiles; an eager one gives way to one with graphs."""
    done = [results.cells.get(f"{engine.kind}/{step}") for step in ("prefill", "decode")]
    return all(
        cell is not None and cell["library"] == facts.library() and (eager or not cell.get("eager", False))
        for cell in done
    )


def _profile_engine(stage: Stage, results: Results, engine: Engine, prompts: int) -> None:
    """Profile one engine in a process of its own; a failure is noted."""
    if stage.left_s < PROFILE_S and not stage.args.tiny:
        print(f"no time left for the profile of {engine.kind}; run the same stage again", flush=True)
        return
    scale = TINY if stage.args.tiny else FULL
    folder, levels = bench.prepare(scale, stage.work, engine.lives)
    run = bench.Run(
        scale=scale,
        cuda=not stage.args.tiny,
        eager=stage.eager,
        tower_graphs=stage.args.tower_graphs,
        repeats=1,
        loads=(),
        folder=folder,
        work=stage.work,
        thresholds={name: level["thresholds"] for name, level in levels.items()},
        deadline=stage.deadline,
        library=facts.library(),
        progress=stage.publisher.results,
    )
    tiny = stage.args.tiny
    plan = bench.plan_of(run, engine, seed=1) | {
        "prompts": 2 if tiny else prompts,
        "requests": 2 if tiny else 64,
    }
    log = stage.work / f"profile-{engine.kind}.log"
    command = [sys.executable, str(HERE / "speed" / "profiling.py"), str(folder), json.dumps(plan)]
    print(f"profiling {engine.kind}", flush=True)
    try:
        os.environ.update(bench.caches(stage.work))
        for answer in lines_of([*command, str(stage.work / "traces")], log, stage.deadline):
            if "step" in answer:
                key = f"{engine.kind}/{answer['step']}"
                results.cells[key] = answer["result"] | {"library": run.library, "eager": run.eager}
                results.failures.pop(engine.kind, None)
                results.save()
    except ProcessFailed as error:
        results.failed(engine.kind, str(error))
        print(f"FAILED {engine.kind}: {error}", flush=True)


STAGES = {"smoke": smoke, "correct": correct, "speed": speed, "profile": profile}


def all_tables(work: Path, tiny: bool, stage: str | None = None) -> str:
    """Tables of all stages that have results, or of one; short ones for one."""
    from benchmarks.gpu.speed import smoke as starting
    from benchmarks.gpu.speed import trace_table

    parts = []
    found = {file.stem: json.loads(file.read_text()) for file in sorted(work.glob("*.json"))}
    if "smoke" in found and stage in (None, "smoke"):
        parts.append(f"## smoke\n\n{head(found['smoke'])}\n\n{starting.table(found['smoke'], tiny)}")
    if stage == "correct":
        parts.append(_short_checks(found))
    if stage is None:
        parts += _checks(found)
    if "speed" in found and stage in (None, "speed"):
        check = tables.check_lines([work / "kernels.json", work / "checking.json"])
        parts.append("## speed\n\n" + tables.report(found["speed"], check, short=stage is not None))
    if "profile" in found and stage in (None, "profile"):
        rows = trace_table.TOP if stage is None else 12
        parts.append(f"## profile\n\n{head(found['profile'])}")
        for key, cell in found["profile"]["cells"].items():
            eager = ", eager" if cell.get("eager") else ""
            parts.append(f"### {key}{eager}\n\n" + trace_table.table(cell, rows))
        parts += tables.failure_lines(found["profile"])
    return "\n\n".join(parts) or "no results"


def _checks(found: dict[str, Any]) -> list[str]:
    """All tables of the checks that have begun."""
    parts = []
    for name, script in (("kernels", kernel_tables), ("checking", check_tables)):
        if name in found:
            cells = found[name]["cells"]
            said = [head(found[name]), script.verdicts(cells), script.table(cells)]
            parts.append(f"## {name}\n\n" + "\n\n".join(said))
    return parts


def _tried(cell: dict[str, Any]) -> str:
    return " (not tried again)" if cell.get("tries", 0) >= TRIES else ""


def _short_checks(found: dict[str, Any]) -> str:
    """What fits on a screen: verdicts, what does not agree, and the times of kernels."""
    cells = {name: found[name]["cells"] if name in found else {} for name in ("kernels", "checking")}
    parts = [head(found[name]) for name in cells if name in found][:1]
    verdicts = {
        "kernels": kernel_tables.verdicts(cells["kernels"]),
        "checking": check_tables.verdicts(cells["checking"]),
    }
    parts.append("\n".join(f"{name}: {said}" for name, said in verdicts.items()))
    wrong = [
        f"- {name}, {key}: {state(cell)}{_tried(cell)}"
        for name, some in cells.items()
        for key, cell in check_tables.wrong_cases(some).items()
    ]
    if len(wrong) > WRONG_LINES:
        wrong = [*wrong[:WRONG_LINES], f"- and {len(wrong) - WRONG_LINES} more in tables.md"]
    parts += ["\n".join(wrong), kernel_tables.times_table(cells["kernels"])]
    return "## correct\n\n" + "\n\n".join(filter(None, parts))


def adopt_orphans() -> None:
    """Have processes whose parent dies become this one's children, so that none is left behind."""
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)


def end_by_force(publisher: Publisher, ended: Callable[[], None]) -> None:
    """The stage has not come to its end in time: end all it started, and itself."""

    def close() -> None:
        print("the stage was ended by force", flush=True)
        end_descendants(forced=True)
        publisher.stop()
        publisher.everything()
        ended()
        sys.stdout.flush()

    try:
        # A thread of its own: what it waits for, a lock or a disk, does not keep this process.
        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(FORCED_END_S)
    finally:
        os._exit(0)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--minutes", type=float, default=9, help="the stage ends within them")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="keep a copy of the results there")
    parser.add_argument("--commit", help="of the sources, where they are not a checkout")
    parser.add_argument("--tiny", action="store_true", help="toy size on a CPU")
    parser.add_argument("--kinds", default=",".join(KINDS), help="engines of smoke, speed and profile")
    parser.add_argument("--lives", help="of speed, see bench.py")
    parser.add_argument("--ratios", help="of speed, see bench.py")
    parser.add_argument("--loads", help="of speed, see bench.py")
    parser.add_argument("--eager", action="store_true", help="of speed and profile: no compiling, no graphs")
    parser.add_argument(
        "--tower-graphs", action="store_true", help="of speed and profile, see bench.py; DIR of its own"
    )
    parser.add_argument("--at-once", type=int, default=3, help="engines that smoke starts at the same time")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    began = time.time()
    args = arguments().parse_args(argv)
    adopt_orphans()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    take_back(work, [args.out, *([args.copy] if args.copy else [])])
    end = began + 60 * args.minutes

    def last_table() -> None:
        print("\n".join(all_tables(work, args.tiny, args.stage).splitlines()[:SCREEN]))
        print(f"{time.time() - began:.0f} s; {sizes(publisher.folders[:1])}", flush=True)

    publisher = Publisher(work, args.out, args.copy, lambda: all_tables(work, args.tiny))
    try:
        facts.device(args.tiny)
    except RuntimeError as error:
        print(error)
        return 1
    guard = threading.Timer(end - FORCED_S - time.time(), end_by_force, (publisher, last_table))
    guard.daemon = True
    guard.start()
    publisher.keep_going()
    try:
        broken = run_stage(STAGES[args.stage], Stage(args, work, end - CLOSING_S, publisher))
        publisher.stop()
        end_descendants()
    finally:
        # Left behind, it would end whatever this process does next.
        guard.cancel()
    publisher.everything()
    last_table()
    return int(broken)


def run_stage(work_of: Callable[[Stage], None], stage: Stage) -> bool:
    """Run a stage; returns whether it broke. What breaks it does not keep its results from being written."""
    try:
        work_of(stage)
    except RuntimeError as error:
        print(f"the stage broke: {error}", flush=True)
    except Exception:
        traceback.print_exc()
    else:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
