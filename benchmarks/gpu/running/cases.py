"""Cases run one after the other in a process that may crash or hang, each result kept as it comes.

The process that runs them (:func:`run_all`) says when it begins a case and what came of it. The one that
starts it (:func:`drive`) writes every result to a file, marks the case during which the process died with the
last line of its error, and starts another process for the cases behind it.
"""

from __future__ import annotations

import faulthandler
import hashlib
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm_hybrid
from benchmarks.gpu.running.answering import Answers
from benchmarks.gpu.running.processes import LONGEST_REASON, REPO, Measuring, ProcessFailed
from benchmarks.gpu.running.results import Results
from benchmarks.gpu.running.tables import head

# What a result depends on besides device, versions and the library.
SCRIPTS = ("benchmarks/gpu/checks/*.py", "benchmarks/gpu/kernels/*.py", "tests/support/*.py")


# On a GPU what takes longer hangs; a CPU is given all the time there is.
MOST_S = 120.0
UNLIMITED_S = 86400.0
# A case that failed so often is not tried again.
TRIES = 2


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        key: its name in the results.
        seconds: how long it is expected to take: it is not begun later than that before the end.
        most_s: a case that takes longer hangs.

    """

    key: str
    seconds: float
    most_s: float = MOST_S


def sources() -> str:
    """A fingerprint of the code that results depend on; those of other code are measured again."""
    library = Path(vllm_hybrid.__file__).parent
    files = [file for file in library.rglob("*") if file.suffix in (".py", ".cpp", ".h")]
    files += [file for pattern in SCRIPTS for file in REPO.glob(pattern)]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.name, str(file))):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def run_all(
    cases: Iterable[Case],
    run: Callable[[str], dict[str, Any]],
    deadline: float,
    answers: Answers,
    recover: Callable[[], None] | None = None,
) -> None:
    """Run cases here and tell what came of each.

    Args:
        cases: the cases, in order.
        run: gives the result of the case of a key, something JSON can hold.
        deadline: seconds since the epoch; a case that is expected to end later is not begun.
        answers: to whom.
        recover: called after a case that raised; where it raises too, or is left out, this process ends.

    """
    for case in cases:
        if time.time() + case.seconds > deadline:
            answers.tell({"skipped": case.key})
            continue
        answers.tell({"began": case.key})
        # Where a case hangs is printed before the process is ended from outside.
        faulthandler.dump_traceback_later(0.9 * case.most_s)
        began = time.perf_counter()
        try:
            result = run(case.key)
        except Exception as error:
            if recover is None:
                raise
            traceback.print_exc()
            recover()
            result = {"failed": traceback.format_exception_only(error)[-1].strip()[:LONGEST_REASON]}
        faulthandler.cancel_dump_traceback_later()
        answers.tell({"key": case.key, "result": result | {"case_s": round(time.perf_counter() - began, 3)}})


def conclude(results: Results, verdict: str, table: str) -> None:
    """Keep the verdict on all cases with the results, and print both below what was measured where."""
    results.content["verdict"] = verdict
    results.save()
    print(head(results.content))
    print(table)
    print(verdict)


class Record:
    """Results of cases on disk, written by several threads.

    A result is kept with the fingerprint of the sources it was measured with, and a failure with how often
    the case was tried with them.

    Args:
        results: the file.
        again: whether cases that failed are to be tried again, TRIES times in all: one that hangs takes long.

    """

    def __init__(self, results: Results, again: bool = False) -> None:
        self.results = results
        self.sources = sources()
        self.lock = threading.Lock()
        self._again = {key for key in self._failed() if self._tries(key) < TRIES} if again else set()
        if again and (given_up := sorted(set(self._failed()) - self._again)):
            print(f"failed {TRIES} times, not tried again: {', '.join(given_up)}", flush=True)

    def _failed(self) -> list[str]:
        """Cases that failed with this very code."""
        cells = self.results.cells
        return [
            key for key, cell in cells.items() if "failed" in cell and cell.get("sources") == self.sources
        ]

    def _tries(self, key: str) -> int:
        """How often a case has failed with this very code."""
        cell = self.results.cells.get(key, {})
        known = "failed" in cell and cell.get("sources") == self.sources
        return int(cell.get("tries", 1)) if known else 0

    def has(self, key: str) -> bool:
        """Whether a case was measured, or failed, with this very code, and is not to be tried again."""
        return key not in self._again and self.results.cells.get(key, {}).get("sources") == self.sources

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result."""
        with self.lock:
            tries = {"tries": self._tries(key) + 1} if "failed" in result else {}
            self.results.cells[key] = result | {"sources": self.sources} | tries
            self._again.discard(key)
            self.results.save()

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Keep what an engine says of itself."""
        with self.lock:
            self.results.engines.setdefault(name, {}).update(facts)
            self.results.save()


@dataclass(frozen=True)
class Runner:
    """A process that runs cases with :func:`run_all`.

    Attributes:
        name: for logs and notes.
        command: gives the command that runs given cases until a deadline.
        start_s: how long it is expected to take before its first case.
        most_start_s: one that takes longer hangs.
        environment: variables of its own.

    """

    name: str
    command: Callable[[Sequence[Case], float], list[str]]
    start_s: float
    most_start_s: float = 2 * MOST_S
    environment: Mapping[str, str] | None = None


def drive(runner: Runner, cases: Sequence[Case], record: Record, logs: Path, deadline: float) -> None:
    """Run cases in processes of their own until all are done or the time is up.

    Args:
        runner: what to start, and again for the cases behind one that crashed.
        cases: the cases; those on record are left out.
        record: where results go.
        logs: folder for a log of each process.
        deadline: seconds since the epoch.

    """
    left = [case for case in cases if not record.has(case.key)]
    attempt = 0
    while left:
        if time.time() + runner.start_s + left[0].seconds > deadline:
            print(f"no time left for {runner.name}: {', '.join(case.key for case in left)}", flush=True)
            return
        attempt += 1
        log = logs / (f"{runner.name}.log" if attempt == 1 else f"{runner.name}-{attempt}.log")
        log.unlink(missing_ok=True)
        left = _attempt(runner, left, record, log, deadline)


def _attempt(runner: Runner, left: Sequence[Case], record: Record, log: Path, deadline: float) -> list[Case]:
    """Start the process once; returns the cases to start another one for."""
    begun: Case | None = None
    done: set[str] = set()
    most_s = runner.most_start_s
    child = Measuring(runner.command(left, deadline), log, runner.environment)
    try:
        while (message := child.next(min(deadline, time.time() + most_s))) is not None:
            if "began" in message:
                begun = next(case for case in left if case.key == message["began"])
                most_s = begun.most_s
            elif "key" in message:
                record.put(message["key"], message["result"])
                done.add(message["key"])
                begun, most_s = None, runner.most_start_s
            elif "skipped" in message:
                print(f"no time left for {runner.name}: {message['skipped']}", flush=True)
            else:
                record.note(runner.name, message)
        return []
    except ProcessFailed as failure:
        if time.time() >= deadline:
            print(f"no time left for {runner.name}", flush=True)
            return []
        print(f"{runner.name}: {failure}", flush=True)
        if begun is not None:
            record.put(begun.key, {"failed": str(failure)})
            return [case for case in left if case.key not in done | {begun.key}]
        # What ends before its first case, or between two, would do so again.
        for case in left:
            if case.key not in done:
                record.put(case.key, {"failed": f"did not start: {failure}"})
        return []
    finally:
        child.end()
