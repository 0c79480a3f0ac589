"""A pytest plugin that ends a run that hangs and says where, and gives one that makes progress all its time.

Progress is processor time of the process and of all it started: the programs and servers of a test count. A
run hangs when all of them together used less than `SHARE` of one core for `stall_seconds` (600, unless the
ini file or `-o` says otherwise), in which no thread stood ready for a core or waited for a disk: a busy
machine takes nothing from the time that a test has. Then the stacks of the process are written, Python
processes below it are told to write theirs and end (`faulthandler`; what they write goes where their test
sent it), and the run stops. A test that waits for such a process fails with what that said; one that does not
end even so is ended with the run.

With pytest-xdist a worker that hangs says so once the others stand still too: it may wait for one of them.
The process that leads them watches as well.

What it does not see: a loop that polls or spins, as ranks do that wait for each other. Tests bound such loops
by steps. What it takes for a hang: to wait that long for another machine or a person.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

# Of one core. An idle `vllm serve` uses 0.013, and what computes uses all of it.
SHARE = 0.05
# How often the window is looked at while it passes.
LOOKS = 40
# For processes that were told to end, and for the test that waited for them, from when they stand still.
GRACE_S = 30.0
# What the leading process waits longer, so that its workers say where they hang and come to their end.
LEADER_PATIENCE_S = 120.0
EXIT_CODE = 70
# By which watchdogs know each other's threads.
THREAD_NAME = "watchdog"
_LAST_BYTES = 6000


class ProcessTree:
    """A process, this one unless another is named, and all below it."""

    def __init__(self, root: int | None = None) -> None:
        self._root = psutil.Process(root)

    def descendants(self) -> list[psutil.Process]:
        """All processes below the first."""
        return self._root.children(recursive=True)

    def use(self) -> tuple[float, bool]:
        """What they have done and would do now, without the threads of watchdogs.

        A watchdog is left out because several may watch one tree: each would find the others at work.

        Returns:
            Seconds of processor time so far; whether a thread stands ready for a core or waits for a disk.

        """
        used_s, wants = 0.0, False
        for process in [self._root, *self.descendants()]:
            with contextlib.suppress(psutil.Error):
                # The last two are of children that have ended.
                used_s += sum(process.cpu_times()[:4])
            for thread in _threads(process.pid):
                if thread.name == THREAD_NAME:
                    used_s -= thread.used_s
                else:
                    wants |= thread.state in ("R", "D")
        return used_s, wants


class Thread(NamedTuple):
    """A thread as the kernel describes it (`proc_pid_stat(5)`)."""

    name: str
    state: str
    used_s: float


def _threads(pid: int) -> Iterator[Thread]:
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):
            # A name may hold blanks and brackets.
            head, _, rest = file.read_text().rpartition(")")
            fields = rest.split()
            ticks = int(fields[11]) + int(fields[12])
            yield Thread(head.partition("(")[2], fields[0], ticks / os.sysconf("SC_CLK_TCK"))


class StallClock:
    """Says when a process tree has used next to no processor time for a while.

    Its time goes on by looks that came when they were to come and found nobody in want of a core or a disk.
    A look that is late had to wait for a core, for the interpreter's lock (whoever holds that computes) or
    for a suspended machine: such time is not held against a test.
    """

    def __init__(self, stall_s: float, looks: int = LOOKS) -> None:
        self.stall_s = stall_s
        self.look_s = stall_s / looks
        self.restart()

    def restart(self) -> None:
        """Begin a new window."""
        self._looks: deque[tuple[float, float]] = deque()

    def stalled(self, waited_s: float, used_s: float, wants: bool = False) -> bool:
        """Take in a look.

        Args:
            waited_s: seconds that a wait for `look_s` took.
            used_s: all processor time so far.
            wants: whether a thread stands ready for a core or waits for a disk.

        Returns:
            Whether `stall_s` seconds passed with less than `SHARE` of a core used.

        """
        # A test that begins meanwhile begins another window.
        looks = self._looks
        in_time = waited_s < self.look_s + sys.getswitchinterval()
        now = (looks[-1][0] if looks else 0.0) + (self.look_s if in_time and not wants else 0.0)
        looks.append((now, used_s))
        while len(looks) > 1 and now - looks[1][0] >= self.stall_s:
            looks.popleft()
        since, before = looks[0]
        # Less than before: a process has left the tree, so something happened.
        return now - since >= self.stall_s and abs(used_s - before) < SHARE * self.stall_s


class Watchdog:
    """Watches one process of a run from a thread.

    Args:
        stall_s: seconds of standstill that make a hang.
        watched: id of the process whose progress counts, with that of all below it.
        always: whether time between tests counts too.
        stderr: descriptor of the standard error that no test captures.

    """

    def __init__(self, stall_s: float, watched: int, always: bool, stderr: int) -> None:
        self._clock = StallClock(stall_s)
        self._always = always
        self._stderr = stderr
        self._watched = ProcessTree(watched)
        self._tree = ProcessTree()
        self._session: pytest.Session | None = None
        self._test = ""
        self._stopped = threading.Event()

    @pytest.hookimpl
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._session = session
        threading.Thread(target=self._watch, name=THREAD_NAME, daemon=True).start()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._clock.restart()
        self._test = item.nodeid
        try:
            return (yield)
        finally:
            self._test = ""

    @pytest.hookimpl
    def pytest_enter_pdb(self) -> None:
        """A person thinks for as long as they like."""
        self._stopped.set()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(THREAD_NAME)
        before = time.monotonic()
        while not self._stopped.wait(self._clock.look_s):
            waited_s = time.monotonic() - before
            used_s, wants = self._watched.use()
            if not (self._always or self._test):
                self._clock.restart()
            elif self._clock.stalled(waited_s, used_s, wants):
                self._end()
                return
            before = time.monotonic()

    def _end(self) -> None:
        test = self._test
        self._say(
            f"\n\nwatchdog: {test or 'the run'} hangs: all its processes together used less than "
            f"{SHARE:.0%} of a core for {self._clock.stall_s:g} s.\n\nStacks of process {os.getpid()}:\n"
        )
        faulthandler.dump_traceback(self._stderr, all_threads=True)
        if self._session is not None:
            self._session.shouldfail = f"{test or 'the run'} hung"
        self._end_descendants()
        # The test that waited for them has their last words, and the run says them at its end.
        if not test or not self._comes_true(lambda: self._test != test):
            self._say("\nwatchdog: it still hangs: the run is ended by force.\n")
            os._exit(EXIT_CODE)

    def _comes_true(self, wanted: Callable[[], bool]) -> bool:
        """Wait for something as long as there is progress; returns whether it came."""
        clock = StallClock(min(self._clock.stall_s, GRACE_S))
        while not wanted():
            before = time.monotonic()
            time.sleep(clock.look_s)
            if clock.stalled(time.monotonic() - before, *self._tree.use()):
                return wanted()
        return True

    def _end_descendants(self) -> None:
        """Have every process below this one say where it stands, and end it."""
        processes = self._tree.descendants()
        logs = {}
        for process in processes:
            with contextlib.suppress(psutil.Error, OSError):
                said = " ".join(process.cmdline())[:200]
                self._say(f"\nProcess {process.pid} below it, {process.status()}: {said}\n")
                if log := _log_of(process.pid):
                    logs[log] = process.pid
        # Deepest first, so that none ends of grief before it has spoken.
        for process in reversed(processes):
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
                process.send_signal(signal.SIGABRT)
        self._comes_true(lambda: not any(map(_is_alive, processes)))
        for process in filter(_is_alive, processes):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for log in logs:
            with contextlib.suppress(OSError):
                self._say(f"\nThe end of {log}:\n{_end_of(log)}\n")

    def _say(self, text: str) -> None:
        os.write(self._stderr, text.encode(errors="replace"))


def _is_alive(process: psutil.Process) -> bool:
    """Looks only: to wait for a process would take its exit code from the test that waits for it."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _log_of(pid: int) -> Path | None:
    """The file that a process writes its errors to, if it is one."""
    path = Path(f"/proc/{pid}/fd/2")
    return path.resolve() if path.exists() and stat.S_ISREG(path.stat().st_mode) else None


def _end_of(file: Path) -> str:
    return file.read_bytes()[-_LAST_BYTES:].decode(errors="replace")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("stall_seconds", "seconds without progress that end a run", default="600")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("usepdb"):
        return
    # Python processes of tests write their stacks when they are told to end.
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    stall_s = float(config.getini("stall_seconds"))
    leads = bool(getattr(config.option, "tx", None)) and not hasattr(config, "workerinput")
    works = hasattr(config, "workerinput")
    # Nothing is captured while plugins are configured.
    stderr = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)
    # A worker may wait for what another one does, so what counts is the progress of all.
    watched = os.getppid() if works else os.getpid()
    watchdog = Watchdog(stall_s + LEADER_PATIENCE_S * leads, watched, not works, stderr)
    config.pluginmanager.register(watchdog, "watchdog")
