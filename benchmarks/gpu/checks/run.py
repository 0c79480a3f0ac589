"""Answers of tiny hybrid engines on this machine's device against the tests' reference, case by case.

    python benchmarks/gpu/checks/run.py --out checks.json            # on a GPU
    python benchmarks/gpu/checks/run.py --out checks.json            # again: goes on where the time ran out
    python benchmarks/gpu/checks/run.py --tiny --out checks.json     # two engines, on a CPU

Engines are eager and compiled with CUDA graphs, in float32 and bf16, each in a process of its own. Every case
is answered twice; merged sets, kept sets, log-probabilities, tokens and the bits of the second run are
reported apart. What disagrees is in the table and does not end the run: the exit status is 1 only where the
run itself broke.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks.gpu.checks import asked  # noqa: E402
from benchmarks.gpu.checks.asked import CASES  # noqa: E402
from benchmarks.gpu.checks.compare import TOLERANCES  # noqa: E402
from benchmarks.gpu.checks.tables import table, verdicts  # noqa: E402
from benchmarks.gpu.running.cases import (  # noqa: E402
    MOST_S,
    UNLIMITED_S,
    Case,
    Record,
    Runner,
    conclude,
    drive,
)
from benchmarks.gpu.running.results import begin  # noqa: E402

SCRIPT = Path(__file__).resolve().parent / "one_engine.py"
START_S = 60
CASE_S = 15
# Side by side on one GPU: they mostly keep the host busy.
TOGETHER = 5


@dataclass(frozen=True)
class Engine:
    """An engine to check.

    Attributes:
        dtype: it computes in.
        eager: neither compiled nor captured.
        ratio: share of an image's tokens that FastV drops.

    """

    dtype: str
    eager: bool
    ratio: float = 0.5

    @property
    def name(self) -> str:
        return f"{self.dtype}-{'eager' if self.eager else 'graphs'}-R{self.ratio:g}"

    def cases(self, most_s: float = MOST_S) -> list[Case]:
        """Its cases and when one hangs; without graphs nothing is filled up to a graph's size."""
        names = [name for name in CASES if not (self.eager and CASES[name].condition == "padded")]
        return [Case(f"{self.name}: {name}", CASE_S, most_s) for name in names]


ENGINES = (
    Engine("float32", eager=True),
    Engine("float32", eager=False),
    Engine("bfloat16", eager=False),
    Engine("bfloat16", eager=True),
    Engine("float32", eager=False, ratio=0.0),
)
TINY = (Engine("float32", eager=True), Engine("bfloat16", eager=True))


def check(args: argparse.Namespace, record: Record, deadline: float) -> None:
    """Run the cases of every engine that are not on record, as far as the time goes."""
    logs = args.out.with_name(args.out.stem + "-logs")
    logs.mkdir(parents=True, exist_ok=True)
    folder = args.out.with_name(args.out.stem + "-work")
    asked.checkpoint(folder)
    engines = [engine for engine in (TINY if args.tiny else ENGINES) if args.engines in engine.name]
    at_once = 1 if args.tiny else min(args.together, len(engines))
    # Each computes its reference on the CPU.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, at_once)))}

    def run(engine: Engine) -> None:
        def command(left: Sequence[Case], until: float) -> list[str]:
            plan = asdict(engine) | {"cuda": not args.tiny, "folder": str(folder), "deadline": until}
            plan["cases"] = [vars(case) for case in left]
            return [sys.executable, str(SCRIPT), json.dumps(plan)]

        case_s, start_s = (UNLIMITED_S, UNLIMITED_S) if args.tiny else (MOST_S, 2 * MOST_S)
        cases = [
            case
            for case in engine.cases(case_s)
            if not args.cases or case.key.partition(": ")[2] in args.cases
        ]
        drive(Runner(engine.name, command, START_S, start_s, threads), cases, record, logs, deadline)

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        list(pool.map(run, engines))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("checks.json"))
    parser.add_argument("--minutes", type=float, default=9, help="end within this time")
    parser.add_argument("--tiny", action="store_true", help="two engines, on a CPU")
    parser.add_argument("--engines", default="", help="only engines whose name holds this")
    parser.add_argument("--cases", type=lambda names: names.split(","), help=f"some of: {','.join(CASES)}")
    parser.add_argument("--together", type=int, default=TOGETHER, help="engines at a time")
    parser.add_argument("--again", action="store_true", help="try cases that failed once again")
    parser.add_argument("--commit", help="of the sources, where they are not a checkout")
    return parser.parse_args()


def main() -> int:
    args = parse()
    deadline = time.time() + 60 * args.minutes
    try:
        record = Record(begin(args.out, args.tiny, args.commit, tiny=args.tiny), args.again)
    except RuntimeError as error:
        print(error)
        return 1
    record.results.content["tolerances"] = {name: asdict(allowed) for name, allowed in TOLERANCES.items()}
    check(args, record, deadline)
    cells = record.results.cells
    conclude(record.results, verdicts(cells), table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
