"""How tests are shared out among workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import grouping
from tests.support.paths import ROOT

# Says in which worker each test ran.
GIVEN = """
import os, pytest
{line}
@pytest.mark.parametrize("number", range(4))
def test_given(number):
    with open(os.environ["RAN"], "a") as ran:
        print(__name__, os.environ["PYTEST_XDIST_WORKER"], file=ran)
"""


def test_modules_that_share_what_takes_long_run_together_and_others_apart() -> None:
    groups = {file.stem: grouping.group_of(file) for file in (ROOT / "tests").rglob("test_*.py")}
    shared = {name for name, group in groups.items() if group == grouping.ENGINES}
    assert {"test_serving", "test_scheduling", "test_kv_reclaim"} <= shared
    assert "test_tensor_parallel" not in shared and groups["test_attention"] == "test_attention"
    demo = {name for name, group in groups.items() if group == grouping.DEMO}
    assert {"test_cli", "test_demo_model", "test_training"} <= demo
    assert set(grouping.LONGEST_FIRST) <= set(groups.values())


def test_workers_get_whole_groups(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    lines = {"test_a": "", "test_b": "", "test_c": "demo_made = 1", "test_d": "demo_made = 2"}
    for name, line in lines.items():
        (tmp_path / f"{name}.py").write_text(GIVEN.format(line=line))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = tmp_path / "ran"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.support.grouping", "-n", "2", "--dist", "loadfile"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=inherited | {"PYTHONPATH": str(ROOT), "RAN": str(ran)},
    )
    assert done.returncode == 0 and "16 passed" in done.stdout, done.stdout + done.stderr
    workers = defaultdict(set)
    for line in ran.read_text().splitlines():
        module, worker = line.split()
        workers[module].add(worker)
    assert all(len(found) == 1 for found in workers.values()), done.stdout
    assert workers["test_c"] == workers["test_d"]


def test_what_uses_the_demo_checkpoint_is_known_by_its_fixtures(request: pytest.FixtureRequest) -> None:
    assert not grouping.uses_demo(request.node)
    fixtures = [*request.fixturenames, "demo_checkpoint", grouping.DEMO_FIXTURE]
    assert grouping.uses_demo(SimpleNamespace(fixturenames=fixtures))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cores", "total", "available", "workers"),
    [
        (1, 64, 64, 0),
        (2, 24, 20, 3),
        (2, 24, 13, 2),
        (2, 16, 16, 2),
        (2, 8, 8, 0),
        (4, 64, 60, 5),
        (64, 512, 500, None),
    ],
)
def test_workers_follow_cores_and_memory(
    cores: int,
    total: int,
    available: int,
    workers: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouping, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    memory = SimpleNamespace(total=total << 30, available=available << 30)
    monkeypatch.setattr(grouping.psutil, "virtual_memory", lambda: memory)
    found = grouping.pytest_xdist_auto_num_workers()
    assert found == (len(grouping.LONGEST_FIRST) if workers is None else workers)


@pytest.mark.parametrize(
    ("limits", "workers"),
    [
        ({"memory.max": "max", "cpu.max": "max 100000"}, 5),
        ({"memory.max": f"{19 << 30}"}, 3),
        ({"cpu.max": "250000 100000"}, 3),
        ({"memory/memory.limit_in_bytes": f"{7 << 30}"}, 0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 5),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_workers_follow_what_a_container_may_use(
    limits: dict[str, str], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = SimpleNamespace(total=64 << 30, available=64 << 30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(grouping.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(grouping, "CONTROL_GROUPS", tmp_path)
    for name, text in limits.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert grouping.pytest_xdist_auto_num_workers() == workers
