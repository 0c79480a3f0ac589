"""The watchdog ends runs that hang, wherever they do, and no run that is slow."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.watchdog import EXIT_CODE, SHARE, ProcessTree, StallClock

# Runs that are to hang lose no more than this; the others have to use a core now and then for as long.
STALL_S, WORKING_STALL_S = 4, 5

WAITS_FOR_EVER = """
import threading
def test_first(): pass
def test_waits(): threading.Event().wait()
def test_later(): pass
"""
WAITS_FOR_A_CHILD = """
import subprocess, sys
def test_child():
    code = "import threading; threading.Event().wait()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
def test_later(): pass
"""
# Each computes for longer than a run may stand still.
WORKS = f"""
import subprocess, sys, time
CODE = "import time\\nwhile time.process_time() < {1.2 * WORKING_STALL_S}: sum(range(100000))"
def test_itself(): exec(CODE)
def test_child(): subprocess.run([sys.executable, "-c", CODE], check=True)
"""


# Two files, and so two workers: one computes, the other waits for it.
HOLDS = f"""
import time
from filelock import FileLock
def test_holds():
    with FileLock("lock"):
        open("held", "w").close()
        while time.process_time() < {2 * WORKING_STALL_S}: sum(range(100000))
"""
AWAITS = """
import os, time
from filelock import FileLock
def test_awaits():
    while not os.path.exists("held"): time.sleep(0.1)
    with FileLock("lock"): pass
"""

WORKERS = ("-n", "2", "--dist", "loadfile", "--max-worker-restart", "0")
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "waits": (WAITS_FOR_EVER, ()),
    "child waits": (WAITS_FOR_A_CHILD, ()),
    "works": (WORKS, ()),
}
if importlib.util.find_spec("xdist"):
    RUNS["worker waits"] = (WAITS_FOR_EVER, WORKERS)
    RUNS["worker's child waits"] = (WAITS_FOR_A_CHILD, WORKERS)
    RUNS["workers wait in turn"] = (HOLDS, WORKERS)
MAY_TAKE_ITS_TIME = ("works", "workers wait in turn")


@dataclass
class Run:
    """A run of tests with the watchdog, and how it ended."""

    folder: Path
    returncode: int
    stdout: str
    stderr: str


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    tests, options = RUNS[name]
    stall_s = WORKING_STALL_S if name in MAY_TAKE_ITS_TIME else STALL_S
    (folder / "pytest.ini").write_text(f"[pytest]\nstall_seconds = {stall_s}\n")
    (folder / "test_given.py").write_text(tests)
    if tests is HOLDS:
        (folder / "test_other.py").write_text(AWAITS)
    # It is no part of this run, which may be a worker's.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "tests.support.watchdog", "-p", "no:cacheprovider", "-v"]
        + list(options),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | {"PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs, at the same time: they wait more than they work."""
    folders = {name: tmp_path_factory.mktemp("run") for name in RUNS}
    started = {name: start(name, folder) for name, folder in folders.items()}
    with ThreadPoolExecutor(len(started)) as pool:
        said = dict(zip(started, pool.map(subprocess.Popen.communicate, started.values()), strict=True))
    return {name: Run(folders[name], run.returncode, *said[name]) for name, run in started.items()}


@pytest.mark.slow
def test_a_test_that_waits_for_ever_ends_the_run_and_its_line_is_named(runs: dict[str, Run]) -> None:
    done = runs["waits"]
    assert done.returncode == EXIT_CODE, done
    assert "watchdog: test_given.py::test_waits hangs" in done.stderr
    assert f'File "{done.folder / "test_given.py"}", line 4 in test_waits' in done.stderr
    assert "test_first PASSED" in done.stdout and "test_later" not in done.stdout


@pytest.mark.slow
def test_a_child_that_waits_for_ever_says_where_and_the_run_ends_with_its_test(runs: dict[str, Run]) -> None:
    done = runs["child waits"]
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done
    assert "watchdog: test_given.py::test_child hangs" in done.stderr
    # The stack of the child.
    assert 'threading.py", line' in done.stdout and "in wait" in done.stdout
    assert "test_child FAILED" in done.stdout and "test_later" not in done.stdout
    assert "test_given.py::test_child hung" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["worker waits", "worker's child waits"])
def test_a_worker_that_hangs_ends_the_run_of_all(runs: dict[str, Run], name: str) -> None:
    if name not in runs:
        pytest.skip("pytest-xdist is not installed")
    done = runs[name]
    assert done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR), done
    assert "watchdog: test_given.py::test_" in done.stderr
    assert "1 failed" in done.stdout and "test_later" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", MAY_TAKE_ITS_TIME)
def test_what_works_has_all_the_time_it_needs(runs: dict[str, Run], name: str) -> None:
    if name not in runs:
        pytest.skip("pytest-xdist is not installed")
    done = runs[name]
    assert done.returncode == 0, done
    assert "2 passed" in done.stdout and "watchdog" not in done.stderr


def test_a_stall_is_a_window_with_next_to_no_processor_time() -> None:
    clock = StallClock(100.0, looks=10)
    assert clock.look_s == 10
    # As much as may be used without counting as work, then a bit more.
    assert [clock.stalled(10, SHARE * 9 * look) for look in range(11)] == [False] * 10 + [True]
    clock.restart()
    assert not any(clock.stalled(10, SHARE * 11 * look) for look in range(50))
    clock.restart()
    # One burst of work counts until it is as long ago as a stall takes.
    used = [0.0] * 5 + [5.0] * 20
    assert [clock.stalled(10, seconds) for seconds in used].index(True) == 15


def test_time_without_a_core_is_not_held_against_a_test() -> None:
    clock = StallClock(100.0, looks=10)
    # A look is late where another thread holds the interpreter's lock, and much later on a busy machine.
    assert not any(clock.stalled(10 + 2 * sys.getswitchinterval(), 0.0) for _ in range(50))
    assert not any(clock.stalled(10, 0.0, wants=True) for _ in range(50))
    # Nor does it make a hang of what was one before.
    assert [clock.stalled(10, 0.0) for _ in range(10)] == [False] * 9 + [True]


@pytest.mark.parametrize(("code", "wants"), [("while True: pass", True), ("threading.Event().wait()", False)])
def test_who_computes_wants_a_core_and_who_waits_does_not(code: str, wants: bool) -> None:
    command = [sys.executable, "-c", f"import threading\nprint(flush=True)\n{code}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = ProcessTree(process.pid)
        try:
            # One that is to wait has a few steps to go until it does; one that computes always would.
            while tree.use()[1] and not wants:
                time.sleep(0.01)
            assert [tree.use()[1] for _ in range(20)] == [wants] * 20
        finally:
            process.kill()
