"""The Triton kernels, interpreted on the CPU and compiled for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# With the least number of tests that each has.
INTERPRETED = {"tests/support/kernels_interpreted.py": 40, "tests/support/tower_interpreted.py": 20}


@pytest.mark.slow
@pytest.mark.parametrize("tests", INTERPRETED)
def test_interpreted_kernels_follow_the_definition(tests: str, seed: int) -> None:
    """Runs tests in a process where Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--seed", str(seed), tests],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= INTERPRETED[tests], done.stdout[-300:]
