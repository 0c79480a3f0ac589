"""The Triton kernels on a GPU: whether their results are right, and their times against what is possible.

    python benchmarks/gpu/kernels/run.py --out kernels.json          # 7B shape, on a GPU
    python benchmarks/gpu/kernels/run.py --out kernels.json          # again: goes on where the time ran out
    python benchmarks/gpu/kernels/run.py --tiny --out kernels.json   # toy shape, Triton's interpreter on CPU
    python benchmarks/gpu/kernels/run.py --floors                    # the floors alone: nothing is run

A scene is a batch of requests with one image each, or images in layers of the vision tower. The kernels'
results are compared with the plain torch implementation on the CPU in float32, on memory that held no numbers
before, and with those of a second run; compute-sanitizer watches small scenes where it is installed. Kernels
are timed whatever the check says, with CUDA events, caches flushed in between. The floor of a kernel is the
longer of two times: the fewest bytes it must move (every stored row read once, however many positions it
stands at) over the bandwidth, and its operations over the peak, which is that of ordinary cores where the
tower's merge computes in float32. A result that is wrong is in the table and does not end the run: the exit
status is 1 only where the run broke.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "--tiny" in sys.argv:
    # Has to be said before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch  # noqa: E402

from benchmarks.gpu.kernels.calls import (  # noqa: E402
    ceilings,
    kernel_calls,
    median_seconds,
    owners_call,
    tower_calls,
)
from benchmarks.gpu.kernels.checks import check, check_tower  # noqa: E402
from benchmarks.gpu.kernels.floors import (  # noqa: E402
    floor_table,
    floors,
    owners_floor,
    tower_floor_table,
    tower_floors,
)
from benchmarks.gpu.kernels.plan import (  # noqa: E402
    BF16,
    SANITIZED,
    SANITIZED_TOWERS,
    SEVEN_B,
    Checked,
    CheckedTower,
    checked_scenes,
    checked_towers,
    timed_scenes,
    timed_towers,
)
from benchmarks.gpu.kernels.sanitizer import TOOLS, program, sanitize  # noqa: E402
from benchmarks.gpu.kernels.scenes import make_scene  # noqa: E402
from benchmarks.gpu.kernels.tables import table, verdicts  # noqa: E402
from benchmarks.gpu.kernels.tower_scenes import make_tower_scene  # noqa: E402
from benchmarks.gpu.prediction.cost_model import Gpu  # noqa: E402
from benchmarks.gpu.running.answering import Answers  # noqa: E402
from benchmarks.gpu.running.cases import (  # noqa: E402
    MOST_S,
    UNLIMITED_S,
    Case,
    Record,
    Runner,
    conclude,
    drive,
    run_all,
)
from benchmarks.gpu.running.results import begin  # noqa: E402

CHECK, TIME, SANITIZER = "check: ", "time: ", "sanitizer: "
START_S = 20
# The first scene of a kind also compiles its kernels.
CASE_S = 10
SANITIZER_S = 60


def run_case(key: str, seed: int, tiny: bool, repeats: int) -> dict[str, Any]:
    """Check or time one scene, or measure the device's ceilings."""
    device = "cpu" if tiny else "cuda"
    kind, name = key.split(": ")
    if name == "ceilings":
        return ceilings()
    if kind + ": " == CHECK:
        return check_scene(name, seed, tiny, device)
    return {"kernels": time_scene(name, seed, tiny, repeats, device)}


def check_scene(name: str, seed: int, tiny: bool, device: str) -> dict[str, Any]:
    """What a scene of attention or of the tower amounts to."""
    scene: Checked | CheckedTower
    if name in (towers := checked_towers(tiny)):
        scene = towers[name]
        found = check_tower(scene.shape, seed, device, scene.dtype)
    else:
        scene = checked_scenes(tiny)[name]
        found = check(scene.shape, seed, device, scene.dtype, scene.bytes_before)
    return found | {"dtype": str(scene.dtype).removeprefix("torch."), "shape": asdict(scene.shape)}


def time_scene(name: str, seed: int, tiny: bool, repeats: int, device: str) -> list[dict[str, Any]]:
    """Times and floors of the kernels of a scene, a row each."""
    dtype = torch.float32 if tiny else BF16
    if name in (towers := timed_towers(tiny)):
        layer = towers[name]
        scene_calls = tower_calls(make_tower_scene(layer.shape, seed, dtype).to(device, dtype))
        least = tower_floors(layer.shape)
        if layer.layer == layer.layers:
            scene_calls["owners"] = owners_call(layer.lengths, layer.patches, device)
            least["owners"] = owners_floor(layer.lengths, layer.patches)
        facts = {"requests": layer.images, "live": layer.tokens, "decodes": False}
    else:
        shape = timed_scenes(tiny)[name]
        scene_calls = kernel_calls(make_scene(shape, seed, device, dtype))
        least = floors(shape.requests, shape.live, shape.patches, shape.text, shape.heads, shape.decodes)
        facts = {"requests": shape.requests, "live": shape.live, "decodes": shape.decodes}
    gpu = Gpu()
    return [
        {
            "kernel": kernel,
            **facts,
            "seconds": median_seconds(call, not tiny, repeats),
            "floor_s": least[kernel].seconds(gpu),
            "floor_bytes": least[kernel].bytes,
            "floor_flops": least[kernel].flops,
            "asked_bytes": max(least[kernel].asked, least[kernel].bytes),
        }
        for kernel, call in scene_calls.items()
    ]


def run_sanitized(seed: int) -> None:
    """The scenes that a sanitizer watches; one line says what their check found."""
    fixed = (seed, "cuda", torch.float32)
    agrees = [check(shape, *fixed, poisoned=False)["agrees"] for shape in SANITIZED]
    agrees += [check_tower(shape, *fixed, poisoned=False)["agrees"] for shape in SANITIZED_TOWERS]
    torch.cuda.synchronize()
    Answers().tell({"scenes": len(agrees), "scenes_agree": all(all(found.values()) for found in agrees)})


def planned(args: argparse.Namespace) -> list[Case]:
    """The cases asked for that the scenes' process runs, in order."""
    keys = []
    if not args.time_only:
        keys += [CHECK + name for name in (*checked_scenes(args.tiny), *checked_towers(args.tiny))]
    if not args.check_only:
        keys += [] if args.tiny else [TIME + "ceilings"]
        keys += [TIME + name for name in (*timed_scenes(args.tiny), *timed_towers(args.tiny))]
    return [Case(key, CASE_S, UNLIMITED_S if args.tiny else MOST_S) for key in keys]


def measure(args: argparse.Namespace, record: Record, deadline: float) -> None:
    """Run all cases that are not on record, as far as the time goes."""
    logs = args.out.with_name(args.out.stem + "-logs")
    logs.mkdir(parents=True, exist_ok=True)
    script = str(Path(__file__).resolve())

    def command(left: Sequence[Case], until: float) -> list[str]:
        plan = {"cases": [vars(case) for case in left], "deadline": until, "seed": args.seed}
        plan |= {"tiny": args.tiny, "repeats": args.repeats}
        return [sys.executable, script, "--run", json.dumps(plan), *(["--tiny"] if args.tiny else [])]

    most_s = UNLIMITED_S if args.tiny else 2 * MOST_S
    drive(Runner("kernels", command, START_S, most_s), planned(args), record, logs, deadline)
    if args.tiny or args.time_only:
        return
    for tool in TOOLS:
        key = SANITIZER + tool
        if record.has(key):
            continue
        if program() is not None and time.time() + SANITIZER_S > deadline:
            print(f"no time left for {key}", flush=True)
            continue
        try:
            record.put(key, sanitize(tool, Path(script), args.seed, logs / f"{tool}.log", deadline))
        except RuntimeError as late:
            print(f"no time left for {key}: {late}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("kernels.json"))
    parser.add_argument("--minutes", type=float, default=9, help="end within this time")
    parser.add_argument("--tiny", action="store_true", help="toy shape, Triton's interpreter on a CPU")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check-only", action="store_true", help="time nothing")
    only.add_argument("--time-only", action="store_true", help="check nothing")
    parser.add_argument("--seed", type=int, help="of the scenes; a fresh one where it is left out")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of a kernel, for their median")
    parser.add_argument("--again", action="store_true", help="try cases that failed once again")
    parser.add_argument("--commit", help="of the sources, where they are not a checkout")
    parser.add_argument("--floors", action="store_true", help="print the floors and run nothing")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    deadline = time.time() + 60 * args.minutes
    if args.floors:
        print(floor_table(1, 90, 576, 60, SEVEN_B))
        print(f"\n{tower_floor_table(timed_towers(tiny=False).values())}")
        return 0
    if args.sanitized is not None:
        run_sanitized(args.sanitized)
        return 0
    if args.run:
        plan = json.loads(args.run)
        cases = [Case(**case) for case in plan["cases"]]
        fixed = (plan["seed"], plan["tiny"], plan["repeats"])
        # A device that does not answer any more makes this raise, and another process goes on.
        recover = (lambda: None) if args.tiny else torch.cuda.synchronize
        run_all(cases, lambda key: run_case(key, *fixed), plan["deadline"], Answers(), recover)
        return 0
    if args.seed is None:
        args.seed = secrets.randbelow(1 << 31)
    print(f"seed {args.seed}", flush=True)
    try:
        record = Record(begin(args.out, args.tiny, args.commit, tiny=args.tiny), args.again)
    except RuntimeError as error:
        print(error)
        return 1
    measure(args, record, deadline)
    cells = record.results.cells
    conclude(record.results, verdicts(cells), table(cells))
    if args.tiny:
        print("(interpreted on a CPU: the times mean nothing)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
