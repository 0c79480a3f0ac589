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

from benchmarks.gpu import bench, facts, tables  # noqa: E402
from benchmarks.gpu.cells import FULL, KINDS, TINY, Engine  # noqa: E402
from benchmarks.gpu.processes import (  # noqa: E402
    ProcessFailed,
    end_descendants,
    end_tree,
    last_error,
    lines_of,
)
from benchmarks.gpu.publishing import Publisher, sizes  # noqa: E402
from benchmarks.gpu.results import Results  # noqa: E402

HERE = Path(__file__).resolve().parent
# Seconds before its end at which a stage's work is over, and at which it is ended by force.
CLOSING_S, FORCED_S = 12.0, 5.0
# Share of the stage's time after which the kernels' check makes room for the engines'.
KERNELS_SHARE = 0.4
PROFILED = (Engine("stock"), Engine("hybrid", 0.5, (90,)))
PROFILE_S = 45
# Most lines of the table that a stage prints last.
SCREEN = 90
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

    def results(self, name: str) -> Results:
        """The stage's file, begun or gone on with.

        Raises:
            RuntimeError: it was made on another device or with other versions.

        """
        same = {"device": facts.device(self.args.tiny), "versions": facts.versions()}
        results = Results(self.work / f"{name}.json", same, command_line())
        results.content["commit"] = self.args.commit or facts.commit()
        results.save()
        return results


def command_line() -> str:
    """The exact command, to be noted with results."""
    return " ".join(["python", *sys.argv])


def kinds_of(args: argparse.Namespace) -> list[str]:
    """Kinds of engine asked for."""
    return str(args.kinds).split(",")


def smoke(stage: Stage) -> None:
    """Start every kind of engine on two layers; measure the device's ceilings."""
    from benchmarks.gpu import smoke as starting

    results = stage.results("smoke")
    if results.content.get("library", facts.library()) != facts.library():
        results.cells.clear()
        results.failures.clear()
    results.content["library"] = facts.library()
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
    code = "import sys; from pathlib import Path; from benchmarks.gpu import bench, cells; "
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
    kernels = ["kernels.py", "--out", str(stage.work / "kernels.json")]
    checking = ["checking.py", "--out", str(stage.work / "checking.json")]
    script(stage, "kernels-check", [*kernels, "--check-only"], KERNELS_SHARE * began)
    script(stage, "checking", checking, stage.left_s)
    script(stage, "kernels-time", [*kernels, "--time-only"], stage.left_s)


def script(stage: Stage, name: str, command: Sequence[str], seconds: float) -> None:
    """Run one of the scripts beside this one within some seconds; how it ends is said and ends nothing."""
    if seconds < 10:
        print(f"no time left for {name}; run the same stage again", flush=True)
        return
    tiny = ["--tiny"] if stage.args.tiny else []
    whole = [sys.executable, str(HERE / command[0]), *command[1:], "--minutes", f"{seconds / 60:.3f}", *tiny]
    log = stage.work / f"{name}.log"
    print(f"{name}: at most {seconds:.0f} s", flush=True)
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
        end_tree(process)
    end_descendants()
    if process.returncode > 0:
        print(f"{name} FAILED with code {process.returncode}: {last_error(log)}; see {log}", flush=True)


def speed(stage: Stage) -> None:
    """The benchmark, as far as the time goes."""
    command = ["--out", str(stage.work / "speed.json"), "--work", str(stage.work)]
    command += ["--budget", f"{stage.left_s:.1f}", "--kinds", stage.args.kinds]
    for option in ("lives", "ratios", "loads"):
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
        if engine.kind in kinds_of(stage.args) and not _profiled(results, engine):
            _profile_engine(stage, results, engine, scale.step_tokens // 640)


def _profiled(results: Results, engine: Engine) -> bool:
    done = [results.cells.get(f"{engine.kind}/{step}") for step in ("prefill", "decode")]
    return all(cell is not None and cell["library"] == facts.library() for cell in done)


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
        eager=stage.args.tiny,
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
    command = [sys.executable, str(HERE / "profiling.py"), str(folder), json.dumps(plan)]
    print(f"profiling {engine.kind}", flush=True)
    try:
        os.environ.update(bench.caches(stage.work))
        for answer in lines_of([*command, str(stage.work / "traces")], log, stage.deadline):
            if "step" in answer:
                key = f"{engine.kind}/{answer['step']}"
                results.cells[key] = answer["result"] | {"library": run.library}
                results.failures.pop(engine.kind, None)
                results.save()
    except ProcessFailed as error:
        results.failed(engine.kind, str(error))
        print(f"FAILED {engine.kind}: {error}", flush=True)


STAGES = {"smoke": smoke, "correct": correct, "speed": speed, "profile": profile}


def all_tables(work: Path, tiny: bool, stage: str | None = None) -> str:
    """Tables of all stages that have results, or of one; short ones for one."""
    from benchmarks.gpu import smoke as starting
    from benchmarks.gpu import trace_table

    parts = []
    found = {file.stem: json.loads(file.read_text()) for file in sorted(work.glob("*.json"))}
    if "smoke" in found and stage in (None, "smoke"):
        parts.append("## smoke\n\n" + _head(found["smoke"]) + starting.table(found["smoke"], tiny))
    if stage in (None, "correct"):
        for log in ("kernels-check", "checking", "kernels-time"):
            if (file := work / f"{log}.log").exists():
                parts.append(f"## {log}\n\n" + "\n".join(file.read_text(errors="replace").splitlines()[-60:]))
    if "speed" in found and stage in (None, "speed"):
        check = tables.check_lines([work / "kernels.json", work / "checking.json"])
        parts.append("## speed\n\n" + tables.report(found["speed"], check, short=stage is not None))
    if "profile" in found and stage in (None, "profile"):
        rows = trace_table.TOP if stage is None else 12
        for key, cell in found["profile"]["cells"].items():
            parts.append(f"## profile: {key}\n\n" + trace_table.table(cell, rows))
        parts += tables.failure_lines(found["profile"])
    return "\n\n".join(parts) or "no results"


def _head(content: dict[str, Any]) -> str:
    device, versions = content["device"], content["versions"]
    driver = f", driver {device['driver']}" if "driver" in device else ""
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{device['name']}{driver}; {said}; commit {content['commit']}\n\n"


def adopt_orphans() -> None:
    """Have processes whose parent dies become this one's children, so that none is left behind."""
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)


def end_by_force(publisher: Publisher, ended: Callable[[], None]) -> None:
    """The stage has not come to its end in time: end all it started, and itself."""
    print("the stage was ended by force", flush=True)
    end_descendants()
    publisher.stop()
    publisher.everything()
    ended()
    sys.stdout.flush()
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
    parser.add_argument("--at-once", type=int, default=3, help="engines that smoke starts at the same time")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    began = time.time()
    args = arguments().parse_args(argv)
    adopt_orphans()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    work = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
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
    broken = run_stage(STAGES[args.stage], Stage(args, work, end - CLOSING_S, publisher))
    publisher.stop()
    end_descendants()
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
