"""The Triton kernels, interpreted on the CPU and compiled for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

INTERPRETED = "tests/support/kernels_interpreted.py"


@pytest.mark.slow
def test_interpreted_kernels_follow_the_definition(seed: int) -> None:
    """Runs tests/support/kernels_interpreted.py in a process where Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--seed", str(seed), INTERPRETED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 40, done.stdout[-300:]
