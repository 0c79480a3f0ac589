"""A pytest plugin that shares tests out among pytest-xdist's workers; without workers it changes nothing.

With `--dist loadfile` the tests of a module run in one worker, so that its fixtures are made once. So do here
all modules that share the engines of `tests.support.engines`, and all that use the demo checkpoint. Groups
that take long come first, for the short ones to even out the end.

The plugin also gives the marker `slow`, beside those that say it themselves, to tests that use the demo
checkpoint. `make test-fast` leaves them out.
"""

from __future__ import annotations

import math
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

ENGINES, DEMO = "engines", "demo"
# By how long they take where every test runs, longest first. Others follow in the order of their names.
LONGEST_FIRST = (
    DEMO,
    "test_first_run",
    ENGINES,
    "test_tensor_parallel",
    "test_v2_runner",
    "test_gpu_bench",
    "test_show",
    "test_scheduler_limits",
    "test_server",
    "test_gpu_checks",
    "test_kernel_builds",
    "test_stack_compiling",
    "test_reference",
    "test_kernels",
    "test_platform_imports",
    "test_other_models",
    "test_watchdog",
)
# A worker with engines, its servers and the compilers that it starts.
MEMORY_OF_A_WORKER = 6 << 30
CONTROL_GROUPS = Path("/sys/fs/cgroup")
DEMO_FIXTURE = "demo_made"
_SERVES = re.compile(r"^from tests\.support\.engines import (?:\([^)]*\bserve\b|.*\bserve\b)", re.MULTILINE)
_DEMO = re.compile(r"\bdemo_(?:made|checkpoint)\b")


def worker_count() -> int:
    """Workers for this machine, as far as free memory goes, and no more than long groups.

    One more than there are cores, because tests also wait; one core runs one test at a time.
    """
    memory = psutil.virtual_memory()
    fit = int(min(memory.total, memory.available, *_memory_limits()) // MEMORY_OF_A_WORKER)
    wanted = cores() + 1 if cores() > 1 else 1
    return max(1, min(wanted, fit, len(LONGEST_FIRST)))


def cores() -> int:
    """Whole cores that this process may use, also where a container has a share of the machine's."""
    return max(1, int(min(len(os.sched_getaffinity(0)), *_core_limits())))


def _memory_limits() -> list[float]:
    """Bytes that a container may use, as both versions of control groups say; infinity for no limit."""
    return [_number(CONTROL_GROUPS / name) for name in ("memory.max", "memory/memory.limit_in_bytes")]


def _core_limits() -> list[float]:
    quota, _, period = _text(CONTROL_GROUPS / "cpu.max").partition(" ")
    newer = int(quota) / int(period) if quota.isdigit() and period.strip().isdigit() else math.inf
    older = _number(CONTROL_GROUPS / "cpu/cpu.cfs_quota_us") / _number(
        CONTROL_GROUPS / "cpu/cpu.cfs_period_us"
    )
    return [newer, math.inf if math.isnan(older) else older]


def _number(file: Path) -> float:
    """What a control group's file says; infinity where it says none, or -1 for it."""
    text = _text(file)
    return int(text) if text.isdigit() else math.inf


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


@cache
def group_of(module: Path) -> str:
    """Name of the tests that run in one worker with a module's, from its text: nobody has to import it."""
    text = module.read_text()
    if _SERVES.search(text):
        return ENGINES
    return DEMO if _DEMO.search(text) else module.stem


def uses_demo(item: pytest.Item) -> bool:
    """Whether a test waits for the demo checkpoint."""
    return DEMO_FIXTURE in getattr(item, "fixturenames", ())


def pytest_configure(config: pytest.Config) -> None:
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        # Before anything imports torch. Threads of several workers would spin for each other's cores.
        threads = max(1, cores() // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means; 0 runs the tests in this process."""
    workers = worker_count()
    return workers if workers > 1 else 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole groups go to a worker, in the order in which they were collected."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in filter(uses_demo, items):
        item.add_marker("slow")
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: places.get(group_of(item.path), len(places)))
