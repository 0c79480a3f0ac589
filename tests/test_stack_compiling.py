"""Lower and upper stack are compiled apart, and find their own graphs again in vLLM's compile cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def errors(cache: Path, environment: dict[str, str]) -> dict[str, float]:
    """What tests/compiled_stacks.py prints, in a process of its own over a compile cache."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_stacks"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={
            **os.environ,
            "VLLM_CACHE_ROOT": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            **environment,
        },
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ERRORS ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("ERRORS "))


# vLLM's default depends on torch. Where nothing is compiled ahead of time, graphs are found by their tag.
@pytest.mark.parametrize("environment", [{}, {"VLLM_USE_AOT_COMPILE": "0"}], ids=["default", "not ahead"])
def test_two_stacks_share_no_compiled_graph(tmp_path: Path, environment: dict[str, str]) -> None:
    for start in ("cold", "warm"):
        found = errors(tmp_path, environment)
        assert all(error < 1e-4 for error in found.values()), (start, found)
