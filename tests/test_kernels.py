"""The Triton kernels, interpreted on the CPU and compiled for GPUs that are not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_interpreted_kernels_follow_the_definition() -> None:
    """Runs tests/kernels_interpreted.py in a process where Triton interprets."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels_interpreted.py"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 40, done.stdout[-300:]
