"""A process that measures: it answers in lines of JSON, keeps a log, and ends with all it started."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[3]
ANSWER = "CELL "
ERROR_LINE = re.compile(r"\b(\w*(?:Error|Exception|Interrupt|Exit)(?:: .*|$))")
# What vLLM says of a failure that some other line explains.
SECOND_HAND = ("Engine core initialization failed", "EngineDeadError", "EngineCore encountered an issue")
LONGEST_REASON = 300
# Seconds that a killed process is waited for; less, and only so often, where a stage ends by force.
END_S = 30.0
FORCED_ROUNDS, FORCED_ROUND_S = 2, 3.0


class ProcessFailed(RuntimeError):
    """A measuring process ended, or gave no answer in time; the message says why and where its log is."""


class Measuring:
    """A child process and its answers.

    Its standard output is searched for answers, lines that begin with ``CELL``; all other lines, and
    its standard error, go to the log.
    """

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self._end_of_log = log.stat().st_size if log.exists() else 0
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
        self._file = log.open("a")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                self._answers.put(json.loads(line.removeprefix(ANSWER)))
            else:
                self._file.write(line)
                self._file.flush()
        self._answers.put(None)

    def send(self, message: dict[str, Any]) -> None:
        """Send a line of JSON to its standard input.

        Raises:
            ProcessFailed: it has ended.

        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise ProcessFailed(self._why("ended")) from error

    def next(self, until: float) -> dict[str, Any] | None:
        """The next answer.

        Args:
            until: seconds since the epoch until which to wait.

        Returns:
            The answer; None when the process has come to its end without a failure.

        Raises:
            ProcessFailed: the process failed, or the time is over.

        """
        try:
            answer = self._answers.get(timeout=max(0.0, until - time.time()))
        except queue.Empty:
            raise ProcessFailed(self._why("gave no answer in time and was ended")) from None
        if answer is None and (code := self._code()):
            raise ProcessFailed(self._why(f"ended with code {code}"))
        return answer

    def _code(self) -> int:
        """The exit status, once the output is closed."""
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(self._why("closed its output and did not end")) from None

    def _why(self, what: str) -> str:
        reason = last_error(self.log, self._end_of_log)
        return f"a measuring process {what}: {reason}; see {self.log}"

    def end(self) -> None:
        """End the process and all it started, and wait until they are gone and their memory is free."""
        end_tree(self.process)
        self._file.close()


def end_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process of its own session with everything it started, and wait for them."""
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _kill(family)
    # What hangs in the driver cannot be killed; nobody waits for it for ever.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)


def end_descendants(forced: bool = False) -> None:
    """Kill everything that this process and its children started and that still runs.

    Args:
        forced: give up on what is still there after FORCED_ROUNDS rounds of FORCED_ROUND_S seconds.

    """
    rounds = 0
    while family := psutil.Process().children(recursive=True):
        if forced and rounds == FORCED_ROUNDS:
            return
        _kill(family, FORCED_ROUND_S if forced else END_S)
        rounds += 1


def _kill(family: list[psutil.Process], wait_s: float = END_S) -> None:
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=wait_s)


def lines_of(command: list[str], log: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Answers of a measuring process, which is ended at the deadline with all it started.

    Args:
        command: the process.
        log: file for what else it prints; an older one is replaced.
        deadline: seconds since the epoch.

    Raises:
        ProcessFailed: it failed before the deadline; the message has the last line of its error.

    """
    log.unlink(missing_ok=True)
    child = Measuring(command, log)
    try:
        while True:
            try:
                answer = child.next(deadline)
            except ProcessFailed:
                if time.time() >= deadline:
                    return
                raise
            if answer is None:
                return
            yield answer
    finally:
        child.end()


def last_error(log: Path, after: int = 0) -> str:
    """The line of a log that says best why its process failed.

    Args:
        log: the file.
        after: byte to begin at.

    """
    if not log.exists():
        return "no log"
    with log.open("rb") as file:
        file.seek(after)
        lines = file.read().decode(errors="replace").splitlines()
    second_hand = ""
    for line in reversed(lines):
        if found := ERROR_LINE.search(line):
            if not any(said in line for said in SECOND_HAND):
                return found[1][:LONGEST_REASON]
            second_hand = second_hand or found[1]
    spoken = [line.strip() for line in lines if line.strip()]
    return (second_hand or (spoken[-1] if spoken else "it said nothing"))[:LONGEST_REASON]
